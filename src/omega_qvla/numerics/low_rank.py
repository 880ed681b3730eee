"""The branch that takes a weight's largest singular values out of what is rounded (SVDQuant §4.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`up` [out, rank] and `down` [rank, in], float64, whose product is the best approximation of W [out, in].

    No other product of that rank leaves a smaller ‖W - up · down‖_F (SVDQuant Eq. 7). Each factor takes the
    square roots of the singular values, so that both can be stored in 16 bits equally well.

    Raises `ValueError` for a rank outside 1 ... min(out, in).
    """
    if not 1 <= rank <= min(weight.shape):
        out, width = weight.shape
        raise ValueError(f"rank {rank} of a weight [{out}, {width}] is outside 1 ... {min(out, width)}")
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
