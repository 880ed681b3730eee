"""How sure a success rate is, and whether two policies differ on the same episodes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class SuccessRate:
    """A share of episodes with its Wilson 95 % interval; `rate`, `low` and `high` are in [0, 1]."""

    successes: int
    episodes: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedComparison:
    """A policy against the reference on the same episodes.

    A win is an episode that the policy solves and the reference does not. `p_value` is McNemar's exact one.
    `difference` and its 95 % interval `low` to `high` are in percentage points, positive if the policy is
    better.
    """

    wins: int
    losses: int
    ties: int
    p_value: float
    difference: float
    low: float
    high: float


def success_rate(successes: int, episodes: int) -> SuccessRate:
    """Share of successes with Wilson's score interval without continuity correction (Wilson 1927).

    Raises `ValueError` if there are no episodes or more successes than episodes.
    """
    if not 0 <= successes <= episodes or episodes == 0:
        raise ValueError(f"{successes} successes in {episodes} episodes is not a success rate")
    interval = stats.binomtest(successes, episodes).proportion_ci(CONFIDENCE, method="wilson")
    # Rounding puts the ends at 1e-17 below 0 or above 1 for none or all successes.
    low, high = max(0.0, float(interval.low)), min(1.0, float(interval.high))
    return SuccessRate(successes, episodes, successes / episodes, low, high)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value that wins and losses are equally likely (McNemar 1947, binomial form)."""
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses, 0.5).pvalue)


def paired_interval(both: int, wins: int, losses: int, neither: int) -> tuple[float, float]:
    """95 % interval of the difference of two success rates on the same episodes, in [-1, 1].

    Newcombe's hybrid score interval for paired proportions (Newcombe 1998, Statistics in Medicine 17,
    method 10). Unlike a bootstrap it needs no random numbers and keeps a width when no episode differs.
    """
    total = both + wins + losses + neither
    policy = success_rate(both + wins, total)
    reference = success_rate(both + losses, total)
    difference = policy.rate - reference.rate
    phi = _correlation(both, wins, losses, neither)
    down, up = policy.rate - policy.low, policy.high - policy.rate
    reference_down, reference_up = reference.rate - reference.low, reference.high - reference.rate
    low = difference - np.sqrt(down**2 - 2 * phi * down * reference_up + reference_up**2)
    high = difference + np.sqrt(up**2 - 2 * phi * up * reference_down + reference_down**2)
    return max(-1.0, float(low)), min(1.0, float(high))


def compare[Key: Hashable](policy: Mapping[Key, bool], reference: Mapping[Key, bool]) -> PairedComparison:
    """Compare the outcomes of two policies, episode to success.

    Raises `ValueError` naming the first episode that only one of them has, or if there is none at all.
    """
    _check_same_episodes(policy, reference)
    wins = sum(policy[episode] and not reference[episode] for episode in policy)
    losses = sum(reference[episode] and not policy[episode] for episode in policy)
    both = sum(policy[episode] and reference[episode] for episode in policy)
    ties = len(policy) - wins - losses
    low, high = paired_interval(both, wins, losses, ties - both)
    difference = 100 * (wins - losses) / len(policy)
    return PairedComparison(wins, losses, ties, mcnemar(wins, losses), difference, 100 * low, 100 * high)


def _check_same_episodes[Key: Hashable](policy: Mapping[Key, bool], reference: Mapping[Key, bool]) -> None:
    if not reference:
        raise ValueError("there are no episodes to compare")
    for episode in reference:
        if episode not in policy:
            raise ValueError(f"the policies ran different episodes: only the reference has {episode}")
    for episode in policy:
        if episode not in reference:
            raise ValueError(f"the policies ran different episodes: the reference lacks {episode}")


def _correlation(both: int, wins: int, losses: int, neither: int) -> float:
    """Newcombe's phi: the correlation of the two outcomes, corrected for continuity where it is positive."""
    margins = (both + wins) * (losses + neither) * (both + losses) * (wins + neither)
    if margins == 0:
        return 0.0
    total = both + wins + losses + neither
    excess = both * neither - wins * losses
    return (max(excess - total / 2, 0.0) if excess > 0 else excess) / float(np.sqrt(margins))
