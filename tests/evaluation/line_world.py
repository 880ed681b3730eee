"""A simulator and policies without a physics engine or a network."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from omega_qvla.evaluation.benchmark import Benchmark
from omega_qvla.evaluation.rollout import EnvironmentFactory
from omega_qvla.evaluation.seeds import METAWORLD_PARTITION
from omega_qvla.policy import Observation

TASKS = ("slide", "turn", "lift")
NOISE_SHAPE = (4, 3)


class Line:
    """A point on a line that must come near the origin; the image shows where it is."""

    def __init__(self, task: str) -> None:
        self.instruction = f"{task} to the origin"
        self.scale = 1.0 + TASKS.index(task)
        self.closed = False
        self.position = np.zeros(2, np.float32)

    def reset(self, seed: int) -> None:
        generator = np.random.default_rng([seed, int(self.scale)])
        self.position = generator.uniform(-1, 1, 2).astype(np.float32) * self.scale

    def step(self, action: np.ndarray) -> bool:
        self.position = self.position + 0.2 * np.clip(action, -1, 1)
        return bool(np.abs(self.position).max() < 0.07)

    def proprioception(self) -> np.ndarray:
        return self.position

    def images(self) -> dict[str, np.ndarray]:
        shade = int(128 + 40 * np.clip(self.position[0], -3, 3))
        return {
            "back": np.full((8, 8, 3), shade, np.uint8),
            "front": np.full((8, 8, 3), 255 - shade, np.uint8),
        }

    def close(self) -> None:
        self.closed = True


def make_line(task: str) -> Line:
    return Line(task)


def line_benchmark(factory: EnvironmentFactory = make_line, record_actions: int = 1) -> Benchmark:
    tasks = {task: f"{task} to the origin" for task in TASKS}
    return Benchmark(
        "line", tasks, factory, max_steps=30, partition=METAWORLD_PARTITION, record_actions=record_actions
    )


class Noting(Line):
    """Notes every episode that starts, in a file of its process."""

    def __init__(self, notes: Path, task: str) -> None:
        super().__init__(task)
        self.task, self.notes = task, notes

    def reset(self, seed: int) -> None:
        super().reset(seed)
        with (self.notes / str(os.getpid())).open("a") as file:
            file.write(f"{self.task} {seed}\n")


def make_noting(notes: Path, task: str) -> Noting:
    return Noting(notes, task)


@dataclass
class Servo:
    """Steps towards the origin, shaken by its noise; every row depends on nothing but that row."""

    label: str = "full precision"
    execution: str = "float"
    noise_shape: tuple[int, int] = NOISE_SHAPE
    execute_steps: int = 2
    gain: float = 1.5
    shake: float = 1.0
    batches: list[int] = field(default_factory=list)
    seen_noise: list[torch.Tensor] = field(default_factory=list)

    def infer(self, observation: Observation, noise: torch.Tensor) -> np.ndarray:
        self.batches.append(len(observation))
        self.seen_noise.append(noise)
        assert noise.dtype == torch.float32
        towards = -self.gain * observation.state[:, None, :]
        return (towards + self.shake * noise.numpy()[..., :2]).astype(np.float32)

    def denoise(self, observation: Observation, noise: torch.Tensor) -> torch.Tensor:
        final = torch.nn.functional.pad(torch.from_numpy(self.infer(observation, noise)), (0, 1))
        return torch.stack([noise + (final - noise) * step / 3 for step in (1, 2, 3)])

    def resident_bytes(self) -> int:
        return 1000


def full_precision() -> Servo:
    return Servo()


def quantized() -> Servo:
    return Servo(label="omega-qvla", execution="simulated", gain=0.5, shake=1.2)


class Broken(Servo):
    """Gives NaN after a few inferences."""

    def infer(self, observation: Observation, noise: torch.Tensor) -> np.ndarray:
        actions = super().infer(observation, noise)
        if len(self.batches) == 3:
            actions[1, 1] = np.nan
        return actions


def broken() -> Broken:
    return Broken(label="broken", gain=0.01, shake=0.0)


class Slow(Servo):
    """Takes long enough to be interrupted."""

    def infer(self, observation: Observation, noise: torch.Tensor) -> np.ndarray:
        time.sleep(0.02)
        return super().infer(observation, noise)


def slow() -> Slow:
    return Slow(label="slow", gain=0.5)


class Fatal(Servo):
    """Ends the process that runs it."""

    def infer(self, observation: Observation, noise: torch.Tensor) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def fatal() -> Fatal:
    return Fatal(label="fatal")


def full_precision_again() -> Servo:
    return Servo(label="kept in float")
