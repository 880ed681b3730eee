"""Quantize Vision-Language-Action policies to 4-bit weights and activations, run them, and prove that they work.

The three verbs are `quantize`, `load` and `evaluate`; see `omega_qvla.api`.
"""

from omega_qvla.api import evaluate, load, quantize

__all__ = ["evaluate", "load", "quantize"]
__version__ = "0.1.0"
