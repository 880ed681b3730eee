"""Floating-point arithmetic on whole numbers: the same sums, computed by the float units."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_EXACT = 2**24


def prepare(codes: Tensor) -> Callable[[Tensor], Tensor]:
    """The inner sums against codes int8 [N, k], as float32.

    Raises `ValueError` if a sum could leave the range in which float32 counts exactly.
    """
    if codes.shape[1] * 127 * int(codes.abs().max()) >= _EXACT:
        raise ValueError(f"sums over {codes.shape[1]} products of codes may exceed 2^24; use smaller groups")
    transposed = codes.to(torch.float32).t()
    return lambda x: x.to(torch.float32) @ transposed
