"""The oracle: 64-bit integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def prepare(codes: Tensor, bits: int) -> Callable[[Tensor], Tensor]:
    """The inner sums against codes int8 [N, k], as int64, whatever their bits."""
    transposed = codes.to(torch.int64).t()
    return lambda x: x.to(torch.int64) @ transposed
