"""The compiled kernels: an input transformed and rounded in one operation, the product of its codes, and the loops of
quantization.

`csrc/` says what they do; here is checked what they are given, for they read and write where they are told to.
"""

from omega_qvla.kernels.native.input import NativeInput, RoundedInput
from omega_qvla.kernels.native.library import NativeUnavailableError, available, products_per_second
from omega_qvla.kernels.native.rounding import round_columns, search_scale
from omega_qvla.kernels.native.weight import NativeWeight

__all__ = [
    "NativeInput",
    "NativeUnavailableError",
    "NativeWeight",
    "RoundedInput",
    "available",
    "products_per_second",
    "round_columns",
    "search_scale",
]
