"""Bit allocation against Algorithm 1 as it is printed, and against every possible allocation."""

from __future__ import annotations

import heapq
from itertools import product

import pytest
import torch
from scipy import stats
from torch import Tensor

from omega_qvla.numerics.allocation import allocate, rank_agreement
from omega_qvla.spec import CHANNEL_WIDTHS

BUDGETS = [0.0, 0.3, 1.9, 2.0, 3.7, 4.0, 4.2, 7.99, 8.0, 11.3, 15.9, 16.0]


def convex_costs(channels: int, seed: int) -> Tensor:
    """Costs that rise faster the narrower a channel already is; 0 at 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.rand(channels, 4, dtype=torch.float64, generator=generator).cumsum(1)
    return torch.nn.functional.pad((slopes * torch.tensor([8, 4, 2, 2])).cumsum(1), (1, 0))


def rough_costs(channels: int, seed: int) -> Tensor:
    """Costs in no order whatever."""
    return torch.rand(channels, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_sizes(channels: int, seed: int) -> Tensor:
    return torch.randint(1, 9, (channels,), generator=torch.Generator().manual_seed(seed)) * 16


def demotions(costs: Tensor, sizes: Tensor) -> list[list[int]]:
    """Algorithm 1 with its heap and without a budget: the widths at the start and after every demotion."""

    def entry(channel: int, level: int) -> tuple[float, int, int]:
        saved = (CHANNEL_WIDTHS[level] - CHANNEL_WIDTHS[level + 1]) * int(sizes[channel])
        return float(costs[channel, level + 1] - costs[channel, level]) / saved, channel, level

    heap = [entry(channel, 0) for channel in range(len(costs))]
    heapq.heapify(heap)
    widths = [[16] * len(costs)]
    while heap:
        _, channel, level = heapq.heappop(heap)
        widths.append(widths[-1].copy())
        widths[-1][channel] = CHANNEL_WIDTHS[level + 1]
        if level + 1 < len(CHANNEL_WIDTHS) - 1:
            heapq.heappush(heap, entry(channel, level + 1))
    return widths


def cost_of(costs: Tensor, widths: Tensor) -> float:
    levels = torch.tensor([CHANNEL_WIDTHS.index(width) for width in widths.tolist()])
    return float(costs.gather(1, levels[:, None]).sum())


def bits_of(widths: Tensor, sizes: Tensor) -> int:
    return int((widths.long() * sizes).sum())


@pytest.mark.parametrize("make", [convex_costs, rough_costs])
@pytest.mark.parametrize("seed", range(3))
def test_budgets_that_demotions_meet_give_algorithm_1(make: object, seed: int) -> None:
    costs, sizes = make(12, seed), random_sizes(12, seed)  # type: ignore[operator]
    for widths in demotions(costs, sizes):
        average = bits_of(torch.tensor(widths), sizes) / int(sizes.sum())
        assert allocate(costs, sizes, average).tolist() == widths


@pytest.mark.parametrize("seed", range(3))
def test_optimal_for_convex_costs_and_one_size_at_budgets_that_demotions_meet(seed: int) -> None:
    costs, sizes = convex_costs(4, seed), torch.full((4,), 32)
    every = torch.tensor(list(product(range(5), repeat=4)))
    bits = torch.tensor(CHANNEL_WIDTHS)[every].sum(1)
    totals = costs[torch.arange(4), every].sum(1)
    for widths in demotions(costs, sizes):
        best = float(totals[bits <= sum(widths)].min())
        assert cost_of(costs, allocate(costs, sizes, sum(widths) / 4)) == pytest.approx(best)


@pytest.mark.parametrize("average", BUDGETS)
def test_budgets_are_kept_and_used(average: float) -> None:
    """No width could be raised with what is left."""
    for seed in range(5):
        costs, sizes = convex_costs(50, seed), random_sizes(50, seed)
        widths = allocate(costs, sizes, average)
        assert widths.dtype == torch.uint8 and set(widths.tolist()) <= set(CHANNEL_WIDTHS)
        left = average * int(sizes.sum()) * (1 + 1e-12) - bits_of(widths, sizes)
        assert left >= 0
        raises = [
            (CHANNEL_WIDTHS[CHANNEL_WIDTHS.index(width) - 1] - width) * size
            for width, size in zip(widths.tolist(), sizes.tolist(), strict=True)
            if width < 16
        ]
        assert left < min(raises, default=1)


def test_no_bits_are_spent_where_they_add_cost() -> None:
    costs = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 7.0, 6.0, 5.0]])
    assert allocate(costs, torch.tensor([1, 1]), 7.5).tolist() == [8, 0]


def test_the_ends() -> None:
    costs, sizes = rough_costs(9, 0), random_sizes(9, 0)
    assert allocate(costs, sizes, 16).tolist() == [16] * 9
    assert allocate(costs, sizes, 0).tolist() == [0] * 9


def test_equal_channels_are_demoted_in_their_order() -> None:
    costs = convex_costs(1, 0).expand(6, -1)
    assert allocate(costs, torch.ones(6, dtype=torch.int64), 12.0).tolist() == [8, 8, 8, 16, 16, 16]


def test_a_long_channel_pays_for_its_bits() -> None:
    """Of two channels with the same costs the one with more weights saves more."""
    costs = convex_costs(1, 0).expand(2, -1)
    assert allocate(costs, torch.tensor([16, 64]), 10.0).tolist() == [16, 8]


@pytest.mark.parametrize("seed", range(3))
def test_more_bits_never_cost_more(seed: int) -> None:
    costs, sizes = convex_costs(20, seed), torch.full((20,), 16)
    allocations = [allocate(costs, sizes, average / 10) for average in range(161)]
    totals = [cost_of(costs, widths) for widths in allocations]
    used = [bits_of(widths, sizes) for widths in allocations]
    assert totals == sorted(totals, reverse=True)
    assert used == sorted(used)


def test_what_cannot_be_allocated_is_refused() -> None:
    costs, sizes = rough_costs(3, 0), torch.tensor([4, 4, 4])
    for average in (-0.1, 16.1, float("nan")):
        with pytest.raises(ValueError, match=f"{average} bits is not between 0 and 16"):
            allocate(costs, sizes, average)
    with pytest.raises(ValueError, match=r"costs \[3, 4\] and sizes \[3\]"):
        allocate(costs[:, :4], sizes, 4)
    with pytest.raises(ValueError, match=r"costs \[3, 5\] and sizes \[2\]"):
        allocate(costs, sizes[:2], 4)
    with pytest.raises(ValueError, match=r"costs \[0, 5\]"):
        allocate(costs[:0], sizes[:0], 4)
    with pytest.raises(ValueError, match="at least 1 weight"):
        allocate(costs, torch.tensor([4, 0, 4]), 4)
    costs[1, 2] = torch.nan
    with pytest.raises(ValueError, match="costs of channel 1 are not finite"):
        allocate(costs, sizes, 4)


@pytest.mark.parametrize("values", [1000, 7])
def test_rank_correlation_is_spearmans(values: int) -> None:
    """Also with many ties."""
    generator = torch.Generator().manual_seed(0)
    proxy = torch.randint(values, (200,), generator=generator).double()
    exact = proxy + torch.randint(values, (200,), generator=generator)
    expected = stats.spearmanr(proxy.numpy(), exact.numpy()).statistic
    assert rank_agreement(proxy, exact).spearman == pytest.approx(expected)


def test_neighbouring_deciles_are_near_the_diagonal() -> None:
    order = torch.arange(100.0)
    same = rank_agreement(order, order.exp2())
    assert same.spearman == pytest.approx(1) and same.near_diagonal == 1
    assert rank_agreement(order, order.roll(10)).near_diagonal == pytest.approx(0.9)
    assert rank_agreement(order, order.roll(20)).near_diagonal == 0
    assert rank_agreement(order, -order).near_diagonal == pytest.approx(0.2)


def test_ranks_that_cannot_be_compared_are_refused() -> None:
    for proxy, exact in ((3, 4), (1, 1)):
        with pytest.raises(ValueError, match="cannot be compared"):
            rank_agreement(torch.rand(proxy), torch.rand(exact))
