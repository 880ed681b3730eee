"""The balancing permutation (Ω-QVLA §4.1; DuQuant's zigzag)."""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag(energy: Tensor, block_size: int) -> Tensor:
    """Order of the channels, int64 [in], that gives every block the same share of energy [in].

    Channels in descending order of energy are dealt to the K blocks 1..K, then K..1, and so on. Permuted
    channel i is channel `order[i]`: `x[..., order]`.
    """
    blocks = energy.numel() // block_size
    if blocks * block_size != energy.numel():
        raise ValueError(f"blocks of {block_size} channels do not divide an input of {energy.numel()}")
    rounds = torch.argsort(energy, descending=True, stable=True).view(block_size, blocks)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.t().reshape(-1)
