"""Bits per output channel under an average budget (QVLA Eq. 7-8, Algorithm 1).

Every channel starts at 16 bits and is demoted step by step, 16 to 8 to 4 to 2 to 0, always where the cost rises
least per bit saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla.spec import CHANNEL_WIDTHS

_ROUNDING = 1e-12
"""Relative error that an average of whole bits, computed in floating point, may have."""


@dataclass(frozen=True)
class RankAgreement:
    """How alike two measures order the same channels."""

    spearman: float
    """Spearman's rank correlation, ties at their mean rank; NaN if one side is constant."""
    near_diagonal: float
    """Share of channels whose two ranks fall in the same or in neighbouring deciles (as in QVLA Fig. 7)."""


def allocate(costs: Tensor, sizes: Tensor, average_bits: float) -> Tensor:
    """Width of every channel, uint8 [channels], with Σ bits · size ≤ average_bits · Σ size.

    `costs` [channels, 5]: what it costs to give a channel the width CHANNEL_WIDTHS[i]. `sizes` int64 [channels]:
    weights in a channel.

    Algorithm 1 keeps the next demotion of every channel in a heap. It pops them in the order of the largest
    ρ = Δcost / bits saved up to and including each demotion of its channel, so one sort finds the same demotions;
    equal ones are taken in the order of the channels. What the last demotion saves beyond the budget is handed
    back: widths are raised where a bit gains most, until no raise fits that does not add cost.

    Optimal for channels of one size whose costs are convex in bits, at budgets that demotions meet exactly.
    O(C log C) for C channels, and O(C) for each raise, of which there are at most 4 · max(size) / min(size).

    Raises `ValueError` for a budget outside 0..16, shapes that do not fit, costs that are not finite and sizes
    below 1.
    """
    _check(costs, sizes, average_bits)
    widths = torch.tensor(CHANNEL_WIDTHS)
    saved = -widths.diff() * sizes[:, None]  # [channels, 4]
    ratio = costs.double().diff(dim=1) / saved
    order = ratio.cummax(1).values.flatten().argsort(stable=True)
    total = int(sizes.sum())
    excess = CHANNEL_WIDTHS[0] * total - math.floor(average_bits * total * (1 + _ROUNDING))
    savings = saved.flatten()[order].cumsum(0)
    count = int(torch.searchsorted(savings, excess)) + 1 if excess > 0 else 0
    demoted = torch.zeros(order.numel(), dtype=torch.bool)
    demoted[order[:count]] = True
    level = demoted.view(saved.shape).sum(1)  # demotions of each channel, an index into CHANNEL_WIDTHS
    if count:
        _hand_back(level, saved, ratio, int(savings[count - 1]) - excess)
    return widths[level].to(torch.uint8)


def rank_agreement(proxy: Tensor, exact: Tensor) -> RankAgreement:
    """How alike a proxy and the exact measure [channels] order the channels.

    Raises `ValueError` unless both are vectors of one length of at least 2.
    """
    if proxy.ndim != 1 or proxy.shape != exact.shape or len(proxy) < 2:
        raise ValueError(f"ranks of {list(proxy.shape)} and {list(exact.shape)} values cannot be compared")
    ranks = torch.stack([_ranks(proxy), _ranks(exact)])
    deciles = (10 * ranks / len(proxy)).floor()
    near = (deciles[0] - deciles[1]).abs() <= 1
    return RankAgreement(float(torch.corrcoef(ranks)[0, 1]), float(near.double().mean()))


def _hand_back(level: Tensor, saved: Tensor, ratio: Tensor, unused: int) -> None:
    """Undo demotions, in place in `level` [channels], as far as `unused` bits go."""
    while True:
        last = (level - 1).clamp(min=0)[:, None]
        bits, gain = saved.gather(1, last).squeeze(1), ratio.gather(1, last).squeeze(1)
        fits = (level > 0) & (bits <= unused) & (gain >= 0)
        if not fits.any():
            return
        best = int(gain.masked_fill(~fits, -torch.inf).argmax())
        level[best] -= 1
        unused -= int(bits[best])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values at their mean rank, float64."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2).double()[inverse]


def _check(costs: Tensor, sizes: Tensor, average_bits: float) -> None:
    if not 0 <= average_bits <= CHANNEL_WIDTHS[0]:
        raise ValueError(f"an average of {average_bits} bits is not between 0 and {CHANNEL_WIDTHS[0]}")
    if costs.ndim != 2 or costs.shape[1] != len(CHANNEL_WIDTHS) or sizes.shape != costs.shape[:1] or not len(sizes):
        shapes = f"costs {list(costs.shape)} and sizes {list(sizes.shape)}"
        raise ValueError(f"{shapes} are not [channels, {len(CHANNEL_WIDTHS)}] and [channels]")
    if not costs.isfinite().all():
        channel = int((~costs.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"the costs of channel {channel} are not finite: {costs[channel].tolist()}")
    if sizes.is_floating_point() or int(sizes.min()) < 1:
        raise ValueError("sizes must be whole numbers of at least 1 weight")
