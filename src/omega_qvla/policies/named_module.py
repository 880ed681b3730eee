"""A module that its user builds and runs, with code that no package carries, as a policy to quantize.

The user gives a function from observations to actions; a target says how the linears are called. Nothing here knows
the model's code. A model that answers without denoising is a policy of one step that takes no noise. Its parts are
vision and language, for which the step does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.anatomy import Block
from omega_qvla.policies.targets import Stack, Target, TargetError
from omega_qvla.policy import Attention, InputSite, Observation, PreviousChunk
from omega_qvla.runtime import DenoisingStep
from omega_qvla.runtime.linear import QuantizedLinear
from omega_qvla.spec import RecipeError

Infer = Callable[[Observation], Any]
"""Actions in physical units, array or tensor [B, chunk, action dimension], for B observations."""
DifferentiableActions = Callable[[Observation], Tensor]
"""Normalized actions, float32 [B, chunk, action dimension], with the graph through which gradients flow to every
linear's output."""


@dataclass(frozen=True)
class TensorsInMemory:
    """Tensors by name, as `omega_qvla.policy.StoredTensors` asks for them."""

    tensors: dict[str, Tensor]

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """Raises `CheckpointError` if it is not finite."""
        tensor = self.tensors[name].detach()
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{name} contains NaN or infinity; the module was loaded from damaged weights")
        return tensor

    def pieces(self, name: str) -> list[Tensor]:
        return [self.read(name)]


class NamedModulePolicy:
    """A module with the names of a target; see `omega_qvla.policy.QuantizablePolicy` for the interface.

    Attention is not offered for correction: recipes with `corrections` are refused.
    """

    noise_shape = (0, 0)
    denoising_steps = 1

    def __init__(
        self,
        module: nn.Module,
        target: Target,
        directory: Path,
        infer: Infer,
        *,
        differentiable_actions: DifferentiableActions | None = None,
        execute_steps: int = 1,
        label: str = "full precision",
        execution: str = "float",
    ) -> None:
        """`module` is what `infer` runs; it is put into evaluation mode. `directory`: what it was loaded from.

        `differentiable_actions`: only for recipes that measure sensitivities.
        """
        self.module, self.target, self.directory = module.eval(), target, directory
        self.label, self.execution, self.execute_steps = label, execution, execute_steps
        self.family = target.name
        self.step = DenoisingStep(self.denoising_steps)
        self._infer, self._differentiable_actions = infer, differentiable_actions

    @torch.no_grad()
    def infer(self, observation: Observation, noise: Tensor, previous: PreviousChunk | None = None) -> np.ndarray:
        """See `omega_qvla.policy.Policy`. Raises `ValueError` if the user's function returns another shape, NaN or
        infinity, or for a previous chunk, of which that function knows nothing."""
        if previous is not None:
            raise ValueError("the function given as infer takes no previous chunk; leave it out")
        found = self._infer(observation)
        actions = np.asarray(found.float().cpu() if isinstance(found, Tensor) else found, dtype=np.float32)
        if actions.ndim != 3 or len(actions) != len(observation):
            shape, expected = list(actions.shape), f"[{len(observation)}, chunk, action dimension]"
            raise ValueError(f"the function given as infer returned shape {shape} instead of {expected}")
        if not np.isfinite(actions).all():
            raise ValueError(f"policy {self.label!r} returned actions with NaN or infinity")
        return actions

    def denoise(self, observation: Observation, noise: Tensor) -> Tensor:
        return torch.from_numpy(self.infer(observation, noise))[None]

    def resident_bytes(self) -> int:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        operands = sum(m.operand_bytes() for m in self.module.modules() if isinstance(m, QuantizedLinear))
        return operands + sum(tensor.nbytes for tensor in tensors if tensor.device.type != "meta")

    def sites(self) -> list[InputSite]:
        """Raises `TargetError` as `fit` does."""
        return [site for block in fit(self.module, self.target) for site in block.sites()]

    def attentions(self) -> list[Attention]:
        return []

    def differentiable_actions(self, observation: Observation, noise: Tensor) -> Tensor:
        """Raises `RecipeError` as `gradients` does."""
        return self.gradients()(observation)

    def gradients(self) -> DifferentiableActions:
        """What was given as `differentiable_actions`. Raises `RecipeError` if nothing was."""
        if self._differentiable_actions is None:
            raise RecipeError(
                "the recipe allocates bits by their effect on the actions, which needs the gradients of the actions: "
                "give differentiable_actions, or choose a recipe without allocation"
            )
        return self._differentiable_actions

    def weight(self, linear: str) -> Tensor:
        """A linear's weight [out, in], in the module's dtype."""
        return self._linear(linear).weight.detach()

    def bias(self, linear: str) -> Tensor | None:
        """A linear's bias [out], in the module's dtype."""
        bias = self._linear(linear).bias
        return None if bias is None else bias.detach()

    def kept_because(self, linear: str) -> str:
        for pattern, reason in self.target.kept.items():
            if re.search(pattern, linear):
                return reason
        raise KeyError(f"target {self.target.name!r} does not know the linear layer {linear}")

    def stored_tensors(self) -> TensorsInMemory:
        """The module's own, in the dtypes that they have in memory."""
        return TensorsInMemory(self.module.state_dict())

    def support_files(self) -> dict[str, Path]:
        files = {path for pattern in self.target.files for path in self.directory.glob(pattern) if path.is_file()}
        return {path.name: path for path in sorted(files)}

    def _linear(self, name: str) -> nn.Linear:
        found = self.module.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found


def fit(module: nn.Module, target: Target) -> list[Block]:
    """The blocks that a target finds in a module, in execution order.

    Raises `TargetError` if a stack or one of its linears is missing or something else than a linear, or if there
    is a linear that the target neither has in a stack nor keeps.
    """
    modules = dict(module.named_modules())
    blocks = [block for stack in target.stacks for block in _blocks(modules, stack, target)]
    inside = {name for block in blocks for site in block.sites() for name in site.linears}
    for name in sorted(inside):
        if name not in modules:
            raise TargetError(f"the module has no {name}, which target {target.name!r} names; correct the target")
        if type(modules[name]) is not nn.Linear:
            raise TargetError(
                f"{name} is a {type(modules[name]).__name__} instead of a torch.nn.Linear; merge adapters and load "
                "the model without other quantization"
            )
    outside = [name for name, found in modules.items() if isinstance(found, nn.Linear) and name not in inside]
    for name in outside:
        if not any(re.search(pattern, name) for pattern in target.kept):
            raise TargetError(
                f"target {target.name!r} does not know the linear layer {name}; name it in a stack, or in `kept` "
                "with the reason"
            )
    return blocks


def _blocks(modules: dict[str, nn.Module], stack: Stack, target: Target) -> list[Block]:
    found = modules.get(stack.blocks)
    if found is None and stack.optional:
        return []
    if not isinstance(found, nn.ModuleList | nn.Sequential) or not len(found):
        what = "has no" if found is None else f"has a {type(found).__name__} instead of a list of blocks at"
        raise TargetError(
            f"the module {what} {stack.blocks}, where target {target.name!r} has its {stack.part} blocks; give the "
            "whole model, or a target with its names"
        )
    return [Block(stack.part, f"{stack.blocks}.{name}", stack.inputs) for name, _ in found.named_children()]
