"""Quantized linears inside a running policy."""

from omega_qvla.runtime.input import QuantizedInput
from omega_qvla.runtime.linear import QuantizedLinear, install, installed, quantized_linears
from omega_qvla.runtime.step import DenoisingStep, StepError
from omega_qvla.runtime.weight import unpacked_bytes

__all__ = [
    "DenoisingStep",
    "QuantizedInput",
    "QuantizedLinear",
    "StepError",
    "install",
    "installed",
    "quantized_linears",
    "unpacked_bytes",
]
