"""From a floating-point policy and a recipe to packed linears."""

from omega_qvla.quantize.driver import Quantized, quantize_policy
from omega_qvla.quantize.plan import build_plan

__all__ = ["Quantized", "build_plan", "quantize_policy"]
