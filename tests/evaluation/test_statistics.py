"""Intervals and tests against values from the literature."""

import pytest

from omega_qvla.evaluation.statistics import compare, mcnemar, paired_interval, success_rate


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        (392, 400, 96.1, 99.0),  # the published 98.0 % of 400 episodes
        (351, 400, 84.2, 90.6),
        (81, 263, 25.53, 36.62),  # Newcombe 1998, "Two-sided confidence intervals for the single proportion"
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (1, 29, 0.61, 17.18),
    ],
)
def test_wilson_interval(successes: int, episodes: int, low: float, high: float) -> None:
    rate = success_rate(successes, episodes)
    assert (100 * rate.low, 100 * rate.high) == pytest.approx((low, high), abs=0.06)


def test_interval_stays_inside_zero_and_one() -> None:
    assert success_rate(0, 7).low == 0.0
    assert success_rate(7, 7).high == 1.0


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_success_rate_is_refused(successes: int, episodes: int) -> None:
    with pytest.raises(ValueError, match="not a success rate"):
        success_rate(successes, episodes)


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (1, 9, 22 / 1024), (2, 8, 112 / 1024), (9, 1, 22 / 1024)],
)
def test_exact_mcnemar(wins: int, losses: int, p_value: float) -> None:
    assert mcnemar(wins, losses) == pytest.approx(p_value)


def test_newcombe_paired_interval() -> None:
    # Newcombe 1998, Statistics in Medicine 17, 2635-2650, table II: method 10 of (20, 12, 2, 16).
    assert paired_interval(20, 12, 2, 16) == pytest.approx((0.0562, 0.3290), abs=2e-3)


def test_paired_interval_has_a_width_when_all_is_equal() -> None:
    low, high = paired_interval(20, 0, 0, 0)
    assert low < 0 < high


def test_paired_counts() -> None:
    policy = {"a": True, "b": True, "c": False, "d": False}
    reference = {"d": False, "c": True, "b": False, "a": True}
    paired = compare(policy, reference)
    assert (paired.wins, paired.losses, paired.ties, paired.difference) == (1, 1, 2, 0.0)
    assert paired.low == pytest.approx(-paired.high)


def test_different_episodes_are_named() -> None:
    with pytest.raises(ValueError, match=r"only the reference has \('push', 1\)"):
        compare({("push", 0): True}, {("push", 0): True, ("push", 1): True})
    with pytest.raises(ValueError, match=r"reference lacks \('push', 2\)"):
        compare({("push", 0): True, ("push", 2): True}, {("push", 0): True})
