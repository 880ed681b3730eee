"""What is kept of a rollout besides its outcome: observations for calibration and frames for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from omega_qvla.evaluation.rollout import (
    LANES,
    MAX_STEPS,
    Environment,
    EnvironmentFactory,
    EnvironmentPool,
    Episode,
    metaworld_environment,
    run_block,
)
from omega_qvla.evaluation.seeds import episode_noise
from omega_qvla.policy import Observation, Policy

STRIP_FRAMES = 6


@dataclass(frozen=True)
class RecordedObservation:
    """An observation, a batch of one, that a policy met at inference number `inference` of an episode."""

    task: str
    seed: int
    inference: int
    observation: Observation

    def noise(self, shape: tuple[int, int]) -> torch.Tensor:
        """The noise of this inference, float32 [1, *shape]: the same as in the rollout."""
        return torch.from_numpy(episode_noise(self.task, self.seed, self.inference, shape))[None]


@dataclass(frozen=True)
class FrameStrip:
    """Evenly spaced images of an episode's first camera, side by side, as base64 of a JPEG file."""

    label: str
    task: str
    seed: int
    success: bool
    jpeg: str


class ObservationRecorder:
    """Keeps the observation of every `every`-th inference."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.recorded: list[RecordedObservation] = []

    def observed(self, task: str, seed: int, inference: int, observation: Observation) -> None:
        """Keep the observation if it is its turn."""
        if inference % self.every == 0:
            self.recorded.append(RecordedObservation(task, seed, inference, observation))

    def finished(self, episode: Episode, environment: Environment) -> None:
        """Nothing to do: the last state is never given to the policy."""


class FrameRecorder:
    """Keeps a frame strip of each of the named episodes (task, seed)."""

    def __init__(self, label: str, episodes: Collection[tuple[str, int]]) -> None:
        self.strips: list[FrameStrip] = []
        self._label = label
        self._frames: dict[tuple[str, int], list[np.ndarray]] = {key: [] for key in episodes}

    def observed(self, task: str, seed: int, inference: int, observation: Observation) -> None:
        """Keep the first camera's image."""
        if (task, seed) in self._frames:
            self._frames[task, seed].append(next(iter(observation.images.values()))[0])

    def finished(self, episode: Episode, environment: Environment) -> None:
        """Add the last state's image and make the strip."""
        frames = self._frames.pop((episode.task, episode.seed), None)
        if frames is None:
            return
        frames.append(next(iter(environment.images().values())))
        jpeg = encode_strip(frames)
        self.strips.append(FrameStrip(self._label, episode.task, episode.seed, episode.success, jpeg))


def encode_strip(frames: Sequence[np.ndarray], count: int = STRIP_FRAMES) -> str:
    """`count` evenly spaced of the frames, uint8 [H, W, 3], side by side; first and last included."""
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([frames[index] for index in chosen], axis=1)).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def collect_observations(
    policy: Policy,
    episodes: Sequence[tuple[str, int]],
    *,
    every: int = 1,
    lanes: int = LANES,
    max_steps: int = MAX_STEPS,
    factory: EnvironmentFactory = metaworld_environment,
) -> list[RecordedObservation]:
    """What the policy saw at every `every`-th inference of its rollouts, ordered by episode and inference."""
    recorder = ObservationRecorder(every)
    pool = EnvironmentPool(factory)
    try:
        run_block(policy, episodes, pool, lanes=lanes, max_steps=max_steps, recorder=recorder)
    finally:
        pool.close()
    order = {key: number for number, key in enumerate(episodes)}
    return sorted(recorder.recorded, key=lambda item: (order[item.task, item.seed], item.inference))


def spread(recorded: Sequence[RecordedObservation], count: int) -> list[RecordedObservation]:
    """At most `count` of the observations, evenly spaced, so that every task and phase keeps its share."""
    if len(recorded) <= count:
        return list(recorded)
    chosen = np.linspace(0, len(recorded) - 1, count).round().astype(int)
    return [recorded[index] for index in chosen]
