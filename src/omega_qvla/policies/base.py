"""What all adapted policies have in common: a module of some library, opened from its own checkpoint or loaded
quantized, whose linears are known by name.

A floating-point policy is opened resident, with every tensor in memory, or streamed: then the weights of its blocks
stay on disk and are read when they are called.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.pack.checkpoint import KEPT_FILE, Checkpoint
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.anatomy import Block
from omega_qvla.policies.assigning import assign
from omega_qvla.policies.float_products import float_products
from omega_qvla.policies.remembering import remember
from omega_qvla.policies.stored import StoredTensors
from omega_qvla.policies.streaming import StreamedLinear, StreamedWeights, stream_linears
from omega_qvla.policy import Attention, InputSite, Interface, Observation, PreviousChunk
from omega_qvla.runtime import DenoisingStep, install, unpacked_bytes
from omega_qvla.runtime.linear import Execution, QuantizedLinear

UNPACKED_BELOW = 2**30
"""Bytes. Policies whose weights take no more when they are unpacked keep them so; others unpack them at each call, so
that they take no more memory than their checkpoint."""

WHO_CHUNKS_IN_REAL_TIME = (
    "pi0, pi0.5, SmolVLA and GR00T N1.7 do real-time chunking, unless their configuration switches it off or their "
    "processors have a step for actions that cannot be undone; leave the previous chunk out"
)


class AdaptedPolicy(ABC):
    """A policy of another library, in floating point or quantized; see `omega_qvla.policy` for the interface.

    A family sets the class attributes below and implements the abstract methods; `attentions`, if its attention
    modules return their weights.
    """

    family: str
    kept: Mapping[str, str]
    """Why linears outside the blocks stay in floating point; keys are searched in their names."""
    copies: Mapping[str, str] = {}
    """Tensors that a checkpoint may lack, and those that they are then copies of."""
    of_the_step: str | None = None
    """Pattern of the names of linears that read nothing but the denoising time."""
    files: tuple[str, ...]
    """Patterns of the files, besides weights, that its checkpoint consists of."""
    noise_shape: tuple[int, int]
    execute_steps: int
    layout: object = None
    """What it was opened from, kept alive."""

    @classmethod
    @abstractmethod
    def without_values(cls, directory: Path) -> nn.Module:
        """The module for the checkpoint in `directory`, in the dtypes in which it runs, with its parameters on the
        meta device.

        Raises `CheckpointError` for a configuration that is not supported.
        """

    @abstractmethod
    def steps(self, module: nn.Module) -> int:
        """The number of denoising steps for which the module is configured."""

    @abstractmethod
    def blocks(self) -> list[Block]:
        """The blocks of all parts, in execution order."""

    @abstractmethod
    def sample(self, observation: Observation, noise: Tensor) -> Tensor:
        """Normalized actions, float32 [B, chunk, action dimension], with gradients if the caller records them.

        Tells `step` in which step it denoises, and appends the chunk before each step to `partial`.
        """

    def sample_continuing(self, observation: Observation, noise: Tensor, previous: PreviousChunk) -> Tensor:
        """As `sample`, drawn to the previous chunk; of families whose interface takes one."""
        raise NotImplementedError(f"{self.family} takes no previous chunk")

    @abstractmethod
    def physical(self, actions: Tensor) -> Tensor:
        """Normalized actions in physical units."""

    @abstractmethod
    def interface(self) -> Interface:
        """What an observation must have, and what the actions are."""

    def attentions(self) -> list[Attention]:
        return []

    def action_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The lowest and the highest action of its normalization in physical units, float64 [action dimension] each.

        None if the normalization has no limits, or they depend on where the robot is.
        """
        return None

    def __init__(self, module: nn.Module, directory: Path, label: str, execution: str) -> None:
        """Around a module that `without_values` made; an adapter attaches to its denoising loop here."""
        self.module, self.directory, self.label, self.execution = module.eval(), directory, label, execution
        self.denoising_steps = self.steps(module)
        self.step = DenoisingStep(self.denoising_steps)
        if self.of_the_step is not None:
            remember(module, self.of_the_step, self.step)
        self.partial: list[Tensor] = []
        self._stored: StoredTensors | None = None
        self._streamed: StreamedWeights | None = None
        self._in_bfloat16 = any(tensor.dtype == torch.bfloat16 for tensor in module.parameters())

    @classmethod
    def open(cls, directory: Path, stored: StoredTensors | None = None, *, streamed: bool = False) -> Self:
        """In floating point, from a checkpoint directory.

        `stored`: its tensors by the names of the module, if the directory itself does not have them so. `streamed`:
        leave the weights of the blocks on disk until they are called; room for the largest block is kept.

        Raises `CheckpointError` if it does not load strictly.
        """
        module = cls.without_values(directory)
        policy = cls(module, directory, "full precision", "float")
        policy._stored = stored if stored is not None else StoredTensors.open(directory)
        stored = policy._stored.with_copies(cls.copies)
        stored.require({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
        on_disk: set[str] = set()
        if streamed:
            stored.check_finite()  # now, and not when the last block is reached
            policy._streamed = StreamedWeights(stored, policy.largest_block())
            linears = [name for site in policy.sites() for name in site.linears]
            on_disk = stream_linears(module, linears, policy._streamed)
        _fill(module, stored, on_disk, mapped=streamed)
        return policy

    @classmethod
    def outline(cls, directory: Path, stored: StoredTensors) -> Self:
        """Its layers without their values: only the headers of the files are read.

        Raises `CheckpointError` if names or shapes are not those of the checkpoint's tensors.
        """
        module = cls.without_values(directory)
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        stored.with_copies(cls.copies).require(shapes)
        return cls(module, directory, "outline", "float")

    @classmethod
    def load(cls, checkpoint: Checkpoint, execution: Execution) -> Self:
        """Quantized, from a verified checkpoint. Weights that were quantized never exist in floating point."""
        directory = checkpoint.policy_directory
        module = cls.without_values(directory)
        recipe = checkpoint.manifest.plan.recipe
        best = recipe.execution
        policy = cls(module, directory, recipe.name, execution if best == "integer" else best)
        if policy.denoising_steps != checkpoint.manifest.denoising_steps:
            raise CheckpointError(
                f"{directory} is configured for {policy.denoising_steps} denoising steps, "
                f"the checkpoint was made for {checkpoint.manifest.denoising_steps}"
            )
        try:
            keep = unpacked_bytes(checkpoint.sites, execution) <= UNPACKED_BELOW
            install(module, checkpoint.sites, policy.step, execution, keep_unpacked=keep)
        except AttributeError as error:
            raise CheckpointError(
                f"{checkpoint.directory} does not fit the policy in {directory}: {error}"
            ) from error
        kept = checkpoint.kept
        tied = {name: kept[source] for name, source in cls.copies.items() if source in kept}
        assign(module, tied | kept, checkpoint.directory / KEPT_FILE)
        return policy

    def infer(self, observation: Observation, noise: Tensor, previous: PreviousChunk | None = None) -> np.ndarray:
        actions = self.physical(self._sampled(observation, noise, previous))
        if not actions.isfinite().all():
            raise ValueError(f"policy {self.label!r} returned actions with NaN or infinity")
        return actions.float().numpy()

    def denoise(self, observation: Observation, noise: Tensor) -> Tensor:
        last = self._sampled(observation, noise)
        padding = noise.shape[-1] - last.shape[-1]
        return torch.stack([*self.partial[1:], nn.functional.pad(last, (0, padding))])

    def differentiable_actions(self, observation: Observation, noise: Tensor) -> Tensor:
        self.partial.clear()
        return self.sample(observation, noise)

    def resident_bytes(self) -> int:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        operands = sum(m.operand_bytes() for m in self.module.modules() if isinstance(m, QuantizedLinear))
        return operands + sum(tensor.nbytes for tensor in tensors if tensor.device.type != "meta")

    def sites(self) -> list[InputSite]:
        return [site for block in self.blocks() for site in block.sites()]

    def weight(self, linear: str) -> Tensor:
        module = self.module.get_submodule(linear)
        weight = module.read() if isinstance(module, StreamedLinear) else module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def largest_block(self) -> int:
        """Bytes of the weights of the block with most of them, in float32."""
        modules = dict(self.module.named_modules())
        return max(
            sum(4 * modules[name].weight.numel() for site in block.sites() for name in site.linears)
            for block in self.blocks()
        )

    @property
    def streamed_capacity(self) -> int:
        return self._weights().capacity

    @streamed_capacity.setter
    def streamed_capacity(self, capacity: int) -> None:
        self._weights().capacity = capacity

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        weights = self._weights()
        weights.rehearsing = True
        try:
            yield
        finally:
            weights.rehearsing = False

    def kept_because(self, linear: str) -> str:
        for pattern, reason in self.kept.items():
            if re.search(pattern, linear):
                return reason
        raise KeyError(f"the {self.family} adapter does not know the linear layer {linear}")

    def stored_tensors(self) -> StoredTensors:
        assert self._stored is not None, "a quantized policy has no tensors of its own"
        return self._stored

    def support_files(self) -> dict[str, Path]:
        files = {path for pattern in self.files for path in self.directory.glob(pattern) if path.is_file()}
        return {str(path.relative_to(self.directory)): path for path in sorted(files)}

    def _weights(self) -> StreamedWeights:
        assert self._streamed is not None, "the policy is resident"
        return self._streamed

    @torch.no_grad()
    def _sampled(self, observation: Observation, noise: Tensor, previous: PreviousChunk | None = None) -> Tensor:
        expected = (len(observation), *self.noise_shape)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise has shape {list(noise.shape)} instead of {list(expected)}")
        if not np.isfinite(observation.state).all():  # it would be binned as if it were a number
            raise ValueError("the observation's state contains NaN or infinity")
        if previous is not None:
            self._check_previous(previous, len(observation))
        self.partial.clear()
        with float_products() if self._in_bfloat16 else nullcontext():
            if previous is None:
                return self.sample(observation, noise)
            return self.sample_continuing(observation, noise, previous)

    def _check_previous(self, previous: PreviousChunk, robots: int) -> None:
        interface = self.interface()
        if not interface.previous_actions:
            raise ValueError(f"the policy {self.label!r} takes no previous chunk; {WHO_CHUNKS_IN_REAL_TIME}")
        count, left, width = previous.actions.shape
        if (count, width) != (robots, interface.action_width) or left > interface.previous_actions:
            raise ValueError(
                f"the previous chunk has shape {list(previous.actions.shape)} instead of [{robots}, 1 to "
                f"{interface.previous_actions}, {interface.action_width}]"
            )


def _fill(module: nn.Module, stored: StoredTensors, on_disk: set[str], *, mapped: bool) -> None:
    """Give every parameter and buffer its value in the module's dtype, but for those that stay on disk.

    A tensor that is stored once is in memory once, under however many names.
    """
    values: dict[str, Tensor] = {}
    at: dict[str, Tensor] = {}
    for name, expected in module.state_dict().items():
        if name in on_disk:
            continue
        where = stored.where(name)
        if where not in at:
            as_it_is = mapped and stored.dtype(name) == expected.dtype
            at[where] = stored.mapped(name) if as_it_is else stored.read(name).to(expected.dtype)
        values[name] = at[where]
    module.load_state_dict(values, strict=False, assign=True)
