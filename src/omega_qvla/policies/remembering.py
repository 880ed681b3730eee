"""Linears that read nothing but the denoising time: computed once for each step, not in every inference."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla.policy import StepContext


@dataclass(frozen=True)
class _Answer:
    x: Tensor
    y: Tensor
    parameters: tuple[Tensor, Tensor | None]
    versions: tuple[int, ...]
    """Of the parameters: they count changes in place."""


class RememberingLinear(nn.Linear):
    """A linear that remembers its answer for each denoising step, and gives it again while its input and parameters
    are the same.

    Outside of steps, under autocast, and where gradients are recorded, it is a linear as any other.
    """

    def __init__(self, linear: nn.Linear, step: StepContext) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype
        )
        self.weight, self.bias = linear.weight, linear.bias
        self._step = step
        self._answers: dict[int, _Answer] = {}

    def forward(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        if torch.is_grad_enabled() or autocast or x.is_inference() or not self._step.running:
            return super().forward(x)
        known = self._answers.get(self._step.current)
        if known is None or not self._holds(known, x):
            y = super().forward(x)
            parameters = self.weight, self.bias
            known = _Answer(x.clone(), y.clone(), parameters, _versions(parameters))
            self._answers[self._step.current] = known
        return known.y.clone()

    def _holds(self, known: _Answer, x: Tensor) -> bool:
        weight, bias = known.parameters
        same = weight is self.weight and bias is self.bias and known.versions == _versions(known.parameters)
        return same and known.x.dtype == x.dtype and torch.equal(known.x, x)


def _versions(parameters: tuple[Tensor, Tensor | None]) -> tuple[int, ...]:
    return tuple(each._version for each in parameters if each is not None)


def remember(module: nn.Module, pattern: str, step: StepContext) -> None:
    """Let the linears whose names match `pattern` remember; they keep their parameters and names."""
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear) and re.search(pattern, name):
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, RememberingLinear(linear, step))
