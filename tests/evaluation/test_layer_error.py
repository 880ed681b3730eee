"""Errors of layers: a known change of every linear is what is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from omega_qvla import api
from omega_qvla.evaluation.layer_error import has_layers, layer_errors
from omega_qvla.evaluation.recording import RecordedObservation
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import Observation
from toy_policy import ToyPolicy, toy_observations


class Stretched(nn.Module):
    """A linear whose output is too large by a factor, and which has to know the step it is in."""

    def __init__(self, linear: nn.Module, factor: float, policy: ToyPolicy, steps: list[int]) -> None:
        super().__init__()
        self.linear, self.factor, self.policy, self.steps = linear, factor, policy, steps

    def forward(self, x: Tensor) -> Tensor:
        if self.policy.step.running:
            self.steps.append(self.policy.step.current)
        return self.factor * self.linear(x)


def recorded(observations: Observation) -> list[RecordedObservation]:
    return [RecordedObservation("toy", 0, n, observations[n : n + 1]) for n in range(len(observations))]


def test_a_known_change_of_every_linear() -> None:
    reference, policy = ToyPolicy(), ToyPolicy()
    steps: list[int] = []
    for number, name in enumerate(["language.q", "language.k", "action.up", "action.down"]):
        part, _, leaf = name.partition(".")
        linears = policy.module.get_submodule(part)
        assert isinstance(linears, nn.ModuleDict)
        linears[leaf] = Stretched(linears[leaf], 1 + 0.1 * (number + 1), policy, steps)
    found = layer_errors(reference, policy, recorded(toy_observations(10)))
    assert [(layer.name, layer.part, layer.block) for layer in found] == [
        ("language.q", "language", 0),
        ("language.k", "language", 0),
        ("action.up", "action", 0),
        ("action.down", "action", 0),
    ]
    np.testing.assert_allclose([layer.normalized_mse for layer in found], [0.01, 0.04, 0.09, 0.16], rtol=1e-4)
    assert steps == 2 * [step for step in range(4) for _ in range(2)]  # two batches, two linears in each step


def test_a_policy_is_left_as_it_was() -> None:
    reference, policy = ToyPolicy(), ToyPolicy()
    assert layer_errors(reference, policy, recorded(toy_observations(2))) == ()
    assert not any(module._forward_hooks for module in reference.module.modules())
    assert has_layers(reference) and not has_layers(object())  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["rtn", "omega-qvla"])
def test_every_quantized_linear_of_a_checkpoint(
    recipe: str, floating: PI05, quantized: Callable[[str], Path], observations: Observation
) -> None:
    policy = api.load(quantized(recipe))
    planned = json.loads((quantized(recipe) / "manifest.json").read_text())["plan"]["linears"]
    found = layer_errors(floating, policy, recorded(observations[:4]))  # type: ignore[arg-type]
    assert {layer.name for layer in found} == {linear["name"] for linear in planned if linear["site"] is not None}
    assert all(0 < layer.normalized_mse < 1 for layer in found)
