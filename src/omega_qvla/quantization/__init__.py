"""From a floating-point policy and a recipe to packed linears."""

from omega_qvla.quantization.driver import Quantized, quantize_policy
from omega_qvla.quantization.plan import build_plan

__all__ = ["Quantized", "build_plan", "quantize_policy"]
