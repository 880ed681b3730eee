"""Closed-loop episodes: several robots in lockstep under one policy.

Everything random about an episode follows from its task and seed (see `seeds`), and the batch handed to the
policy always has the same size, so an episode does not depend on which others ran beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from omega_qvla.evaluation.seeds import episode_noise
from omega_qvla.policy import Observation, Policy

LANES = 8
"""Robots in lockstep: the batch size of a rollout."""


class Environment(Protocol):
    """What the loop needs of a simulated task; `MetaWorldTask` is one."""

    instruction: str

    def reset(self, seed: int) -> None:
        """Start the episode named by `seed`."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Execute one action [action dimension]; returns whether the task is solved."""
        ...

    def proprioception(self) -> np.ndarray:
        """What the robot feels, float32 [D]."""
        ...

    def images(self) -> dict[str, np.ndarray]:
        """Camera name to uint8 [H, W, 3]."""
        ...

    def close(self) -> None:
        """Free the renderer."""
        ...


EnvironmentFactory = Callable[[str], Environment]
"""Task name to a new environment; a module-level function, so that worker processes can import it."""


@dataclass(frozen=True)
class Episode:
    """How one episode ended: `steps` is the number of executed actions, at most the step limit."""

    task: str
    seed: int
    success: bool
    steps: int


class Recorder(Protocol):
    """Something that watches a rollout."""

    def observed(self, task: str, seed: int, inference: int, observation: Observation) -> None:
        """Called with what the policy is about to see, a batch of one."""
        ...

    def finished(self, episode: Episode, environment: Environment) -> None:
        """Called when an episode has ended and its environment still shows the last state."""
        ...


class EnvironmentPool:
    """Environments made when first needed and reused: building one costs more than resetting it."""

    def __init__(self, factory: EnvironmentFactory) -> None:
        self._factory = factory
        self._idle: dict[str, list[Environment]] = {}
        self._all: list[Environment] = []

    def take(self, task: str) -> Environment:
        """An environment of `task` that nobody else is using."""
        if self._idle.get(task):
            return self._idle[task].pop()
        environment = self._factory(task)
        self._all.append(environment)
        return environment

    def give_back(self, task: str, environment: Environment) -> None:
        """Let others use an environment that was taken for `task`."""
        self._idle.setdefault(task, []).append(environment)

    def close(self) -> None:
        """Close all environments, also those in use."""
        for environment in self._all:
            environment.close()
        self._all, self._idle = [], {}


class _Lane:
    """One robot: the episode it runs, or none when the list is exhausted."""

    def __init__(self) -> None:
        self.environment: Environment | None = None
        self.task, self.seed, self.steps, self.inferences = "", 0, 0, 0

    def start(self, task: str, seed: int, pool: EnvironmentPool) -> None:
        self.environment = pool.take(task)
        self.task, self.seed, self.steps, self.inferences = task, seed, 0, 0
        self.environment.reset(seed)

    def observe(self) -> Observation:
        assert self.environment is not None
        images = {camera: image[None] for camera, image in self.environment.images().items()}
        state = np.asarray(self.environment.proprioception(), np.float32)[None].copy()
        return Observation(images, state, (self.environment.instruction,))

    def execute(self, actions: np.ndarray, max_steps: int) -> Episode | None:
        """Execute the actions [n, dimension] until success or the step limit; the episode if it ended."""
        assert self.environment is not None
        for action in actions[: max_steps - self.steps]:
            success = self.environment.step(action)
            self.steps += 1
            if success or self.steps == max_steps:
                return Episode(self.task, self.seed, bool(success), self.steps)
        return None


def run_block(
    policy: Policy,
    episodes: Sequence[tuple[str, int]],
    pool: EnvironmentPool,
    *,
    max_steps: int,
    lanes: int = LANES,
    recorder: Recorder | None = None,
) -> list[Episode]:
    """Run the episodes (task, seed) and return them in the same order.

    `lanes` robots run in lockstep: one inference, then up to `policy.execute_steps` actions in each; an
    episode ends at its first success. A robot that is done takes the next episode; when there is none left
    its place in the batch is padded with another robot's observation. Raises `ValueError` for an episode that
    is listed twice, a policy that executes more actions than its chunk has, or an action that is not finite.
    """
    _check_block(policy, episodes, lanes, max_steps)
    robots = [_Lane() for _ in range(lanes)]
    waiting = list(reversed(episodes))
    ended: dict[tuple[str, int], Episode] = {}
    while len(ended) < len(episodes):
        for robot in robots:
            if robot.environment is None and waiting:
                robot.start(*waiting.pop(), pool)
        active = [robot for robot in robots if robot.environment is not None]
        actions = _infer(policy, active, lanes, recorder)
        for robot, chunk in zip(active, actions, strict=True):
            episode = robot.execute(chunk, max_steps)
            if episode is not None:
                ended[episode.task, episode.seed] = episode
                _finish(robot, episode, pool, recorder)
    return [ended[key] for key in episodes]


def _check_block(policy: Policy, episodes: Sequence[tuple[str, int]], lanes: int, max_steps: int) -> None:
    if len(set(episodes)) != len(episodes):
        raise ValueError("an episode (task, seed) is listed twice")
    if lanes < 1 or max_steps < 1:
        raise ValueError(f"lanes ({lanes}) and max_steps ({max_steps}) must be at least 1")
    if not 1 <= policy.execute_steps <= policy.noise_shape[0]:
        raise ValueError(
            f"{policy.label} executes {policy.execute_steps} actions of a chunk of {policy.noise_shape[0]}"
        )


def _infer(policy: Policy, active: list[_Lane], lanes: int, recorder: Recorder | None) -> np.ndarray:
    """The next actions of the active robots, float32 [active, execute_steps, action dimension]."""
    observations = [robot.observe() for robot in active]
    if recorder is not None:
        for robot, observation in zip(active, observations, strict=True):
            recorder.observed(robot.task, robot.seed, robot.inferences, observation)
    noise = np.zeros((lanes, *policy.noise_shape), np.float32)
    for row, robot in enumerate(active):
        noise[row] = episode_noise(robot.task, robot.seed, robot.inferences, policy.noise_shape)
        robot.inferences += 1
    padding = [observations[0]] * (lanes - len(active))
    chunk = policy.infer(Observation.concatenate(observations + padding), torch.from_numpy(noise))
    actions = chunk[: len(active), : policy.execute_steps]
    _check_finite(policy, active, actions)
    return actions


def _check_finite(policy: Policy, active: list[_Lane], actions: np.ndarray) -> None:
    for robot, chunk in zip(active, actions, strict=True):
        bad = ~np.isfinite(chunk).all(axis=-1)
        if bad.any():
            raise ValueError(
                f"policy {policy.label!r} gave an action that is not finite: task {robot.task}, "
                f"seed {robot.seed}, step {robot.steps + int(bad.argmax())}"
            )


def _finish(robot: _Lane, episode: Episode, pool: EnvironmentPool, recorder: Recorder | None) -> None:
    assert robot.environment is not None
    if recorder is not None:
        recorder.finished(episode, robot.environment)
    pool.give_back(robot.task, robot.environment)
    robot.environment = None
