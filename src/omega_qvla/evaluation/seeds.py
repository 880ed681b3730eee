"""Which seeds belong to what, so that no policy is judged on what it was trained or calibrated with.

A seed names an initial state (see `MetaWorldTask.reset`) and, with the task and the inference number, the
noise that denoising starts from.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

EVALUATION_FIRST_SEED = 0
EVALUATION_SEEDS = range(EVALUATION_FIRST_SEED, 100_000)
"""Success rates are measured here."""
CALIBRATION_FIRST_SEED = 500_000
CALIBRATION_SEEDS = range(CALIBRATION_FIRST_SEED, 600_000)
"""Trajectories of the full-precision policy that activation statistics come from."""
FIDELITY_FIRST_SEED = 600_000
FIDELITY_SEEDS = range(FIDELITY_FIRST_SEED, 700_000)
"""Held-out observations for action error."""
TRAINING_FIRST_SEED = 1_000_000
TRAINING_SEEDS = range(TRAINING_FIRST_SEED, 2_000_000_000)
"""Demonstrations."""


@dataclass(frozen=True)
class Partition:
    """Which initial states of every task, by number, are for what. Raises `ValueError` if one is for two uses."""

    evaluation: range
    held_out: range
    calibration: range

    def __post_init__(self) -> None:
        check_disjoint(vars(self))


def check_disjoint(uses: Mapping[str, Iterable[int]]) -> None:
    """Raise `ValueError` naming two uses and a seed that both of them have."""
    seeds = {use: values if isinstance(values, range) else frozenset(values) for use, values in uses.items()}
    for first, second in combinations(seeds, 2):
        shared = _shared_seed(seeds[first], seeds[second])
        if shared is not None:
            raise ValueError(f"seed {shared} is used for both {first} and {second}")


def check_within(seeds: Iterable[int], allowed: range, use: str) -> None:
    """Raise `ValueError` for the first seed outside the range kept for `use`."""
    for seed in seeds:
        if seed not in allowed:
            article = "an" if use[0] in "aeiou" else "a"
            raise ValueError(
                f"seed {seed} is not {article} {use} seed; those are {allowed.start} to {allowed.stop - 1}"
            )


def episode_noise(task: str, seed: int, inference: int, shape: tuple[int, int]) -> np.ndarray:
    """Standard normal noise, float32 [*shape], for inference number `inference` (from 0) of an episode.

    It depends on nothing else, so every policy of one `shape` meets the same noise.
    """
    return noise_of(episode_key(task, seed), inference, shape)


def episode_key(task: str, seed: int) -> tuple[int, int]:
    """What the noise of an episode is drawn from: its seed, and the CRC-32 of the task's name, which does not depend
    on which other tasks are evaluated."""
    return seed, zlib.crc32(task.encode())


def noise_of(key: tuple[int, int], inference: int, shape: tuple[int, int]) -> np.ndarray:
    """The noise of the episode with this key; see `episode_noise`."""
    return np.random.default_rng([*key, inference]).standard_normal(shape).astype(np.float32)


def _shared_seed(first: range | frozenset[int], second: range | frozenset[int]) -> int | None:
    if isinstance(first, range) and isinstance(second, range) and first.step == second.step == 1:
        start = max(first.start, second.start)
        return start if start < min(first.stop, second.stop) else None
    return next((seed for seed in sorted(first) if seed in second), None)


METAWORLD_PARTITION = Partition(EVALUATION_SEEDS, FIDELITY_SEEDS, CALIBRATION_SEEDS)
