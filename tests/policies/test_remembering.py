"""Linears of the denoising time: the same bits, computed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omega_qvla.policies import open_or_load, open_policy
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policies.remembering import RememberingLinear, remember
from omega_qvla.policy import Observation
from omega_qvla.runtime import DenoisingStep


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each product of a linear."""
    calls: list[str] = []
    forward = nn.Linear.forward

    def count(self: nn.Linear, x: Tensor) -> Tensor:
        calls.append(type(self).__name__)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", count)
    return calls


@torch.no_grad()
def test_it_answers_as_a_linear_does(counted: list[str]) -> None:
    linear, step = nn.Linear(4, 3), DenoisingStep(2)
    holder = nn.ModuleDict({"dense": linear, "other": nn.Linear(4, 3)})
    remember(holder, r"^dense$", step)
    remembering = holder["dense"]
    assert isinstance(remembering, RememberingLinear) and not isinstance(holder["other"], RememberingLinear)
    assert dict(holder.named_parameters()).keys() == {"dense.weight", "dense.bias", "other.weight", "other.bias"}
    inputs = torch.randn(2, 1, 4)
    expected = [linear(x) for x in inputs]
    counted.clear()
    for _ in range(3):
        for index, x in enumerate(inputs):
            with step.at(index):
                answer = remembering(x)
                assert torch.equal(answer, expected[index])
                answer.zero_()  # whoever gets it may change it
    assert len(counted) == 2
    with step.at(0):
        assert torch.equal(remembering(inputs[1]), expected[1])
        remembering.weight.mul_(2)
        assert torch.equal(remembering(inputs[1]), linear(inputs[1]))
        remembering.bias.add_(1)
        assert torch.equal(remembering(inputs[1]), linear(inputs[1]))
        remembering.bias = None
        assert torch.equal(remembering(inputs[1]), inputs[1] @ linear.weight.T)
    assert len(counted) == 8
    remembering(inputs[0])
    assert len(counted) == 9


def test_gradients_are_recorded() -> None:
    step = DenoisingStep(1)
    remembering = RememberingLinear(nn.Linear(4, 3), step)
    with step.at(0):
        for _ in range(2):
            assert remembering(torch.ones(1, 4)).requires_grad


@torch.no_grad()
def test_what_autocast_rounds_is_not_remembered() -> None:
    linear, step, x = nn.Linear(64, 3), DenoisingStep(1), torch.randn(1, 64)
    remembering = RememberingLinear(linear, step)
    with step.at(0):
        with torch.autocast("cpu", torch.bfloat16):
            assert remembering(x).dtype == torch.bfloat16
        assert torch.equal(remembering(x), linear(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert remembering(x).dtype == torch.bfloat16


def test_a_policy_computes_its_modulations_once(
    checkpoint: Path, observations: Observation, noise: Tensor, counted: list[str]
) -> None:
    policy = open_policy(checkpoint)
    assert isinstance(policy, PI05)
    first = policy.infer(observations[:1], noise[:1])
    of_the_step = counted.count("RememberingLinear")
    assert of_the_step > 0
    assert np.array_equal(policy.infer(observations[:1], noise[:1]), first)
    assert counted.count("RememberingLinear") == of_the_step
    two = policy.infer(observations[:2], noise[:2])  # a batch of another size is another input
    assert counted.count("RememberingLinear") == 2 * of_the_step
    assert np.allclose(two[:1], first, atol=1e-4)


def test_a_quantized_policy_does_too(
    quantized: Callable[[str], Path], observations: Observation, noise: Tensor, counted: list[str]
) -> None:
    policy = open_or_load(quantized("omega-int4"), "integer")
    first = policy.infer(observations[:1], noise[:1])
    of_the_step = counted.count("RememberingLinear")
    assert of_the_step > 0 and np.array_equal(policy.infer(observations[:1], noise[:1]), first)
    assert counted.count("RememberingLinear") == of_the_step
