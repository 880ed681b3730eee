"""Quantized linears inside a running policy."""

from omega_qvla.runtime.linear import QuantizedInput, QuantizedLinear, install, installed
from omega_qvla.runtime.step import DenoisingStep, StepError
from omega_qvla.runtime.weight import unpacked_bytes

__all__ = [
    "DenoisingStep",
    "QuantizedInput",
    "QuantizedLinear",
    "StepError",
    "install",
    "installed",
    "unpacked_bytes",
]
