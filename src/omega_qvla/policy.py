"""What evaluation, calibration and serving know of a policy, quantized or not."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from omega_qvla.spec import Part


@dataclass(frozen=True)
class Observation:
    """A batch of B observations, as a robot delivers them."""

    images: dict[str, np.ndarray]
    """Camera name to uint8 [B, H, W, 3]."""
    state: np.ndarray
    """Proprioception in physical units, float32 [B, D]."""
    instructions: tuple[str, ...]
    """One sentence per robot."""

    def __len__(self) -> int:
        return len(self.instructions)

    def __getitem__(self, index: slice) -> Observation:
        images = {camera: image[index] for camera, image in self.images.items()}
        return Observation(images, self.state[index], self.instructions[index])

    @staticmethod
    def concatenate(parts: list[Observation]) -> Observation:
        """One batch out of several with the same cameras."""
        images = {camera: np.concatenate([part.images[camera] for part in parts]) for camera in parts[0].images}
        instructions = tuple(sentence for part in parts for sentence in part.instructions)
        return Observation(images, np.concatenate([part.state for part in parts]), instructions)


@dataclass(frozen=True)
class PreviousChunk:
    """What was left of the last chunk when the observations were taken, which the next one shall continue: real-time
    chunking (Black et al. 2025, arXiv 2506.07339). All robots of a batch share its delay.

    Raises `ValueError` for what cannot be one.
    """

    actions: np.ndarray
    """In physical units, float32 [B, T, D]: the first would be executed next, were there no new chunk."""
    delay: int
    """How many of them are executed before the new chunk is there, 0 to T; as many of its actions come too late."""
    execution_horizon: int | None = None
    """How many of them the new chunk is drawn to, by less and less after the delay; None: as the policy is
    configured, but no fewer than the delay."""

    def __post_init__(self) -> None:
        if self.actions.ndim != 3 or self.actions.dtype != np.float32 or self.actions.shape[1] < 1:
            shape = list(self.actions.shape)
            raise ValueError(
                f"the previous chunk is {self.actions.dtype} {shape} instead of float32 [batch, actions, dimension]; "
                "leave it out if nothing of it is left"
            )
        if not np.isfinite(self.actions).all():
            raise ValueError("the previous chunk contains NaN or infinity")
        left = self.actions.shape[1]
        if not 0 <= self.delay <= left:
            raise ValueError(f"the delay is {self.delay}, but {left} actions of the previous chunk are left")
        if self.execution_horizon is not None and self.execution_horizon < max(1, self.delay):
            raise ValueError(
                f"the execution horizon is {self.execution_horizon}; it must be at least {max(1, self.delay)}, "
                "no shorter than the delay"
            )

    def __len__(self) -> int:
        return len(self.actions)


@dataclass(frozen=True)
class Interface:
    """What a policy takes and gives, for those who must check it before they make anything of it."""

    cameras: dict[str, tuple[int, int] | None]
    """Camera name to height and width of its images in pixels; None: the policy resizes whatever it gets."""
    state: dict[str, int]
    """The named parts of the state, in their order, and how many numbers each has."""
    actions: dict[str, int]
    """The named parts of an action, in their order, and how many numbers each has."""
    previous_actions: int = 0
    """How many actions of a previous chunk `infer` takes at most; 0: it does no real-time chunking."""

    @property
    def state_width(self) -> int:
        return sum(self.state.values())

    @property
    def action_width(self) -> int:
        return sum(self.actions.values())


class Policy(Protocol):
    """A policy that turns observations into chunks of actions by denoising."""

    label: str
    """What reports call it: a recipe's name, or `full precision`."""
    execution: str
    """How its quantized linears run: `float`, `simulated` or `integer`."""
    noise_shape: tuple[int, int]
    """Shape of one observation's initial noise: chunk length, padded action dimension."""
    execute_steps: int
    """How many actions of a chunk are executed before the next inference."""

    def infer(
        self, observation: Observation, noise: torch.Tensor, previous: PreviousChunk | None = None
    ) -> np.ndarray:
        """Actions in physical units, float32 [B, chunk, action dimension]; `noise` is float32 [B, *noise_shape].

        Raises `ValueError` if the observation lacks a camera that the policy was trained with, or if the policy
        cannot continue the previous chunk.
        """
        ...

    def denoise(self, observation: Observation, noise: torch.Tensor) -> torch.Tensor:
        """The partly denoised chunk after each step, float32 [steps, B, chunk, padded action dimension]."""
        ...

    def resident_bytes(self) -> int:
        """Bytes of all parameters and buffers in memory."""
        ...


@dataclass(frozen=True)
class InputSite:
    """The linears that read one and the same input."""

    name: str
    part: Part
    block: str
    """The layer they belong to."""
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Attention:
    """One attention module whose forward returns its output and the weights after softmax [B, heads, query, key]."""

    name: str
    part: Part
    query: str
    """The linear that makes the queries: head h has output rows h · d to (h + 1) · d - 1."""
    output: str
    """The linear from the heads to the residual stream."""
    heads: int


class StoredTensors(Protocol):
    """A checkpoint's tensors by the names of the module, in the dtypes in which they are stored, each read when it
    is asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor:
        """In memory. Raises `ValueError` that names it if it is not finite."""
        ...

    def pieces(self, name: str) -> Iterable[torch.Tensor]:
        """Its values in their order, in one tensor or cut into several. Raises as `read` does."""
        ...


class StepContext(Protocol):
    """Tells in which denoising step the policy is."""

    @property
    def running(self) -> bool: ...

    @property
    def current(self) -> int: ...

    def at(self, step: int) -> AbstractContextManager[None]:
        """While open, `step` is running. Raises an error if the policy has no such step."""
        ...


class QuantizablePolicy(Policy, Protocol):
    """A floating-point policy that knows its own anatomy; what an adapter offers to quantization."""

    family: str
    module: nn.Module
    """All of its layers, under the names of its checkpoint."""
    denoising_steps: int
    directory: Path
    """The checkpoint it was opened from."""

    @property
    def step(self) -> StepContext:
        """The denoising step that is running."""
        ...

    def sites(self) -> list[InputSite]:
        """The input sites of all parts, in execution order."""
        ...

    def attentions(self) -> list[Attention]:
        """The attention modules of language and action, in execution order."""
        ...

    def differentiable_actions(self, observation: Observation, noise: torch.Tensor) -> torch.Tensor:
        """Normalized actions, float32 [B, chunk, action dimension], as `infer` finds them before it turns them into
        physical units; with the graph through which gradients flow to every linear's output."""
        ...

    def weight(self, linear: str) -> torch.Tensor:
        """The weight [out, in] of one of its linears, which may have to be read from disk."""
        ...

    def kept_because(self, linear: str) -> str:
        """Why a linear outside the sites stays in floating point. Raises `KeyError` for one it does not know."""
        ...

    def stored_tensors(self) -> StoredTensors:
        """The checkpoint's tensors."""
        ...

    def support_files(self) -> dict[str, Path]:
        """What a checkpoint needs besides weights (configuration, processors, tokenizer), by relative name."""
        ...


class DeclaredPolicy(Policy, Protocol):
    """A policy that says what it takes and gives; what a server needs."""

    def interface(self) -> Interface:
        """Read from its checkpoint."""
        ...


class StreamedPolicy(QuantizablePolicy, Protocol):
    """A floating-point policy whose blocks' weights are read from disk when they are called."""

    streamed_capacity: int
    """Bytes of these weights, in float32, that may stay in memory."""

    def rehearsing(self) -> AbstractContextManager[None]:
        """While open, the blocks' linears answer with zeros and read nothing."""
        ...
