"""What is kept of a rollout besides its outcome: observations for calibration and frames for the report."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from omega_qvla.evaluation.benchmark import Benchmark
from omega_qvla.evaluation.rollout import (
    LANES,
    Environment,
    EnvironmentPool,
    Episode,
    run_block,
)
from omega_qvla.evaluation.seeds import episode_noise
from omega_qvla.policy import Observation, Policy

STRIP_FRAMES = 6
KEPT_FRAMES = 48
"""Images of a running episode that are in memory at most."""


@dataclass(frozen=True)
class RecordedObservation:
    """An observation, a batch of one, that a policy met at inference number `inference` of an episode."""

    task: str
    seed: int
    inference: int
    observation: Observation
    draw: int = 0
    """0: the noise of the rollout; other numbers, other noise."""

    def noise(self, shape: tuple[int, int]) -> torch.Tensor:
        """The noise of this inference, float32 [1, *shape]: the same as in the rollout, if `draw` is 0."""
        task = f"{self.task} draw {self.draw}" if self.draw else self.task
        return torch.from_numpy(episode_noise(task, self.seed, self.inference, shape))[None]


@dataclass(frozen=True)
class FrameStrip:
    """Evenly spaced images of an episode's first camera, side by side, as base64 of a JPEG file."""

    label: str
    task: str
    seed: int
    success: bool
    jpeg: str


class ObservationRecorder:
    """Keeps the observations of every `every`-th inference and of those that follow it, `together` in all."""

    def __init__(self, every: int = 1, together: int = 1) -> None:
        self.every, self.together = every, together
        self.recorded: list[RecordedObservation] = []

    def observed(self, task: str, seed: int, inference: int, observation: Observation) -> None:
        """Keep the observation if it is its turn."""
        if inference % self.every < self.together:
            self.recorded.append(RecordedObservation(task, seed, inference, observation))

    def finished(self, episode: Episode, environment: Environment) -> None:
        """Nothing to do: the last state is never given to the policy."""


class FirstStrips:
    """Of each task the strip of its first success and that of its first failure, in whatever order they come."""

    def __init__(self, episodes: Sequence[tuple[str, int]]) -> None:
        """`episodes`: (task, seed) in their order."""
        self._place = {key: place for place, key in enumerate(episodes)}
        self._found: dict[tuple[str, bool], FrameStrip] = {}

    def wants(self, task: str, seed: int, success: bool) -> bool:
        """Whether none is known that comes before."""
        known = self._found.get((task, success))
        return known is None or self._place[task, seed] < self._place[known.task, known.seed]

    def offer(self, strip: FrameStrip) -> None:
        """Keep it if it is wanted."""
        if self.wants(strip.task, strip.seed, strip.success):
            self._found[strip.task, strip.success] = strip

    def strips(self) -> list[FrameStrip]:
        """In the order of the episodes."""
        return sorted(self._found.values(), key=lambda strip: self._place[strip.task, strip.seed])


class _Frames:
    """Evenly spaced images of an episode of any length, fewer than KEPT_FRAMES."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []
        self._seen, self._every = 0, 1

    def add(self, image: np.ndarray) -> None:
        if self._seen % self._every == 0:
            self.images.append(image)
        if len(self.images) == KEPT_FRAMES:
            self.images, self._every = self.images[::2], 2 * self._every
        self._seen += 1


class FrameRecorder:
    """Keeps a frame strip of the first success and of the first failure of each task among the episodes."""

    def __init__(self, label: str, episodes: Sequence[tuple[str, int]]) -> None:
        self._label = label
        self._frames: dict[tuple[str, int], _Frames] = defaultdict(_Frames)
        self._first = FirstStrips(episodes)

    @property
    def strips(self) -> list[FrameStrip]:
        """In the order of the episodes."""
        return self._first.strips()

    def observed(self, task: str, seed: int, inference: int, observation: Observation) -> None:
        """Keep the first camera's image, if it is its turn."""
        self._frames[task, seed].add(next(iter(observation.images.values()))[0])

    def finished(self, episode: Episode, environment: Environment) -> None:
        """Add the last state's image and make the strip, if it is wanted."""
        frames = self._frames.pop((episode.task, episode.seed))
        if self._first.wants(episode.task, episode.seed, episode.success):
            jpeg = encode_strip([*frames.images, next(iter(environment.images().values()))])
            self._first.offer(FrameStrip(self._label, episode.task, episode.seed, episode.success, jpeg))


def encode_strip(frames: Sequence[np.ndarray], count: int = STRIP_FRAMES) -> str:
    """`count` evenly spaced of the frames, uint8 [H, W, 3], side by side; first and last included."""
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([frames[index] for index in chosen], axis=1)).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def collect_observations(
    policy: Policy,
    episodes: Sequence[tuple[str, int]],
    benchmark: Benchmark,
    *,
    together: int = 1,
    lanes: int = LANES,
) -> list[RecordedObservation]:
    """What the policy saw in its own rollouts, as often as the benchmark records, and at the inferences that follow,
    `together` in all; ordered by episode and inference."""
    recorder = ObservationRecorder(benchmark.record_every(policy.execute_steps), together)
    pool = EnvironmentPool(benchmark.factory)
    try:
        run_block(policy, episodes, pool, lanes=lanes, max_steps=benchmark.max_steps, recorder=recorder)
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


def consecutive(recorded: Sequence[RecordedObservation]) -> list[tuple[int, int]]:
    """Positions of observations that follow one another: inferences n and n + 1 of one episode."""
    places = {(item.task, item.seed, item.inference): place for place, item in enumerate(recorded)}
    following = {place: places.get((task, seed, number + 1)) for (task, seed, number), place in places.items()}
    return [(place, after) for place, after in following.items() if after is not None]


def spread_pairs(recorded: Sequence[RecordedObservation], count: int) -> list[RecordedObservation]:
    """At most `count` of the observations, as evenly spaced pairs that follow one another."""
    pairs = consecutive(recorded)
    if len(recorded) <= count or not pairs:
        return spread(recorded, count)
    chosen = np.linspace(0, len(pairs) - 1, count // 2).round().astype(int)
    return [recorded[place] for place in sorted({place for index in chosen for place in pairs[index]})]
