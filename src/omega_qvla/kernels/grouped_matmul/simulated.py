"""Floating-point arithmetic on whole numbers: the same sums, computed by the float units."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LARGEST_INPUT = 128
"""Magnitude of the lowest of the codes of 8 bits."""


def prepare(codes: Tensor, bits: int) -> Callable[[Tensor], Tensor]:
    """The inner sums against codes int8 [N, k] of at most `bits` bits, in `dtype_of(k, bits)`."""
    dtype = dtype_of(codes.shape[1], bits)
    transposed = codes.to(dtype).t()
    return lambda x: x.to(dtype) @ transposed


def dtype_of(width: int, bits: int) -> torch.dtype:
    """float32, or float64 where a sum of `width` products could exceed 2^24."""
    return torch.float32 if width * _LARGEST_INPUT * 2 ** (bits - 1) <= 2**24 else torch.float64
