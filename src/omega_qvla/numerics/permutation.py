"""Permutations that deal input channels to the blocks of a rotation by their energy."""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag(energy: Tensor, block_size: int) -> Tensor:
    """Order of the channels, int64 [in], that gives every block the same share of energy [in].

    Channels in descending order of energy are dealt to the K blocks 1..K, then K..1, and so on (Ω-QVLA §4.1,
    DuQuant's zigzag). Permuted channel i is channel `order[i]`: `x[..., order]`.

    Raises `ValueError` if the blocks do not divide the input.
    """
    rounds = _descending(energy, block_size).view(block_size, -1)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.t().reshape(-1)


def interleaved(energy: Tensor, block_size: int) -> Tensor:
    """Order of the channels, int64 [in]: largest energy [in], smallest, second largest, second smallest ...

    Blocks are cut from that list as it is, which does not balance them: the first holds the largest and the
    smallest channels. This is the permutation of the code released with Ω-QVLA. Permuted channel i is channel
    `order[i]`.

    Raises `ValueError` if the blocks do not divide the input.
    """
    ranked = _descending(energy, block_size)
    order = torch.empty_like(ranked)
    order[0::2] = ranked[: len(order[0::2])]
    order[1::2] = ranked.flip(0)[: len(order[1::2])]
    return order


def _descending(energy: Tensor, block_size: int) -> Tensor:
    if energy.numel() % block_size:
        raise ValueError(f"blocks of {block_size} channels do not divide an input of {energy.numel()}")
    return torch.argsort(energy, descending=True, stable=True)
