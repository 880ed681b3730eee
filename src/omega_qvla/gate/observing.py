"""Observations that calibration did not see, each with its own noise."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from omega_qvla.evaluation.benchmark import Benchmark
from omega_qvla.evaluation.recording import RecordedObservation, collect_observations, spread_pairs
from omega_qvla.policy import Policy

EPISODES_PER_TASK = 2
"""Of full precision, from held-out initial states."""


@dataclass(frozen=True)
class Observed:
    """Observations in an order in which those of an episode stand together."""

    recorded: list[RecordedObservation]
    source: str
    held_out: bool


def from_rollouts(reference: Policy, count: int, benchmark: Benchmark, calibrated_on: Collection[str]) -> Observed:
    """What full precision sees in its own episodes from initial states that are kept for this.

    Raises `ValueError` if the simulator's episodes do not suit the policy.
    """
    seeds = benchmark.held_out_seeds(EPISODES_PER_TASK)
    episodes = [(task, seed) for task in benchmark.tasks for seed in seeds]
    recorded = collect_observations(reference, episodes, benchmark, together=2)
    seen = any(f"{task}:{seed}" in calibrated_on for task, seed in episodes)
    source = f"full precision's own episodes of {benchmark.name}, seeds {seeds[0]} to {seeds[-1]}"
    return Observed(spread_pairs(recorded, count), source, not seen)


def from_dataset(root: Path, count: int, execute_steps: int, calibrated_on: Collection[str]) -> Observed:
    """Pairs of frames of a lerobot dataset, `execute_steps` apart, from episodes new to it, if there are any.

    Raises as `policies.dataset.read_consecutive` does.
    """
    from omega_qvla.policies.dataset import episode_id, read_consecutive

    frames = read_consecutive(root, count, execute_steps, calibrated_on)
    recorded = [
        RecordedObservation(root.name, frame.episode, frame.number // execute_steps, frame.observation)
        for frame in frames
    ]
    seen = any(episode_id(root, frame.episode) in calibrated_on for frame in frames)
    return Observed(recorded, f"the dataset {root.name}", not seen)
