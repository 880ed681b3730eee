"""How long one inference takes, measured for all policies in turn so that a busy machine slows them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from omega_qvla.evaluation.recording import RecordedObservation
from omega_qvla.policy import Policy


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one `infer` with a batch of one; `spread_ms` is the interquartile range."""

    p50_ms: float
    p95_ms: float
    minimum_ms: float
    maximum_ms: float
    spread_ms: float
    repeats: int
    warm_up: int
    threads: int
    """Threads that torch used on the CPU."""


def measure_latency(
    policies: Sequence[Policy], recorded: RecordedObservation, *, repeats: int = 20, warm_up: int = 3
) -> list[Latency]:
    """Time `repeats` inferences of each policy, one of each per round, after `warm_up` untimed rounds.

    Raises `ValueError` if `repeats` is not positive.
    """
    if repeats < 1:
        raise ValueError(f"latency needs at least one repeat, not {repeats}")
    rounds = [[_milliseconds(policy, recorded) for policy in policies] for _ in range(warm_up + repeats)]
    return [_summary(np.asarray(times), warm_up) for times in zip(*rounds[warm_up:], strict=True)]


def _milliseconds(policy: Policy, recorded: RecordedObservation) -> float:
    noise = recorded.noise(policy.noise_shape)
    start = perf_counter()
    policy.infer(recorded.observation, noise)  # returns a NumPy array, so an accelerator has finished
    return 1000 * (perf_counter() - start)


def _summary(times: np.ndarray, warm_up: int) -> Latency:
    p25, p50, p75, p95 = (float(value) for value in np.percentile(times, [25, 50, 75, 95]))
    slowest, fastest = float(times.max()), float(times.min())
    return Latency(p50, p95, fastest, slowest, p75 - p25, len(times), warm_up, torch.get_num_threads())
