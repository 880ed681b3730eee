"""Floating-point arithmetic on whole numbers: the same sums, computed by the float units."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LARGEST_CODE = 127


def prepare(codes: Tensor) -> Callable[[Tensor], Tensor]:
    """The inner sums against codes int8 [N, k], in float32, or in float64 where a sum could exceed 2^24."""
    exact = codes.shape[1] * _LARGEST_CODE * int(codes.abs().max()) < 2**24
    dtype = torch.float32 if exact else torch.float64
    transposed = codes.to(dtype).t()
    return lambda x: x.to(dtype) @ transposed
