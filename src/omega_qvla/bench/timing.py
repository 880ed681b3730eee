"""Times of several ways to do the same, taken in turn so that a busy machine slows them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

_BURST = 0.03
"""Seconds that a contender works before the next one does; the first call of a burst is not counted, for the threads
of the library before may still be spinning."""
_MOST_CALLS = 20
_PATIENCE = 4.0
"""Seconds for all rounds of a contender that is very slow; it has at least two."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    p50: float
    p95: float
    p99: float
    minimum: float
    spread: float
    """Interquartile range."""
    calls: int


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Times of each call, in `rounds` rounds of one burst each after a round that is not counted; those that take
    seconds take part in fewer.

    Raises `ValueError` if there is no round.
    """
    if rounds < 1:
        raise ValueError(f"times need at least one round, not {rounds}")
    slowest = {name: max(_burst(call)) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            if number < max(2, 1000 * _PATIENCE / slowest[name]):
                call()
                taken[name] += _burst(call)
    return {name: summary(times) for name, times in taken.items()}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """While open, torch and the compiled kernels use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def summary(milliseconds: list[float]) -> Times:
    times = np.asarray(milliseconds)
    p25, p50, p75, p95, p99 = (float(value) for value in np.percentile(times, [25, 50, 75, 95, 99]))
    return Times(p50, p95, p99, float(times.min()), p75 - p25, len(times))


def _burst(call: Callable[[], object]) -> list[float]:
    times: list[float] = []
    started = perf_counter()
    while not times or (perf_counter() - started < _BURST and len(times) < _MOST_CALLS):
        before = perf_counter()
        call()
        times.append(1000 * (perf_counter() - before))
    return times
