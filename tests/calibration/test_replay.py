"""Recorded calls of a block against the block itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.calibration import CalibrationError
from omega_qvla.calibration.replay import BlockCall, record_block
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import InputSite, Observation
from toy_policy import WIDTH, ToyPolicy, toy_observations

STACKS = "model.paligemma_with_expert"
VISION = f"{STACKS}.paligemma.model.vision_tower.vision_model.encoder.layers.0"
LANGUAGE = f"{STACKS}.paligemma.model.language_model.layers.1"
ACTION = f"{STACKS}.gemma_expert.model.layers.1"


class StepsOfOneLinear(ToyPolicy):
    """The toy, of which the linear `action.up` is a block."""

    def sites(self) -> list[InputSite]:
        return [InputSite("action.input", "action", "action.up", ("action.up",))]


def record(policy: Any, block: str, observations: Observation, **options: Any) -> list[BlockCall]:
    return record_block(policy, block, observations, noise_seed=0, **options)


@pytest.mark.parametrize("name", [VISION, LANGUAGE, ACTION])
def test_a_call_gives_the_recorded_output_again_and_again(
    floating: PI05, observations: Observation, name: str
) -> None:
    block = floating.module.get_submodule(name)
    with torch.no_grad():
        for call in record(floating, name, observations):
            assert torch.equal(call.run(block), call.output)
            assert torch.equal(call.run(block), call.output)


def test_the_output_is_what_the_policy_went_on_with(floating: PI05, observations: Observation) -> None:
    """The output of layer 0 is the input of layer 1."""
    first = record(floating, ACTION.removesuffix("1") + "0", observations)
    second = record(floating, ACTION, observations)
    assert [call.step for call in first] == [call.step for call in second] == list(range(10))
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before.output, after.args[0])


def test_replaced_weights_and_their_gradient(floating: PI05, observations: Observation) -> None:
    block = floating.module.get_submodule(ACTION)
    call = record(floating, ACTION, observations)[3]
    assert torch.equal(call.run(block, {"mlp.up_proj.weight": block.mlp.up_proj.weight.clone()}), call.output)
    weight = (2 * block.mlp.up_proj.weight).detach().requires_grad_()
    output = call.run(block, {"mlp.up_proj.weight": weight})
    assert not torch.equal(output, call.output)
    (gradient,) = torch.autograd.grad(output.square().sum(), weight)
    assert gradient.abs().sum() > 0


def test_of_the_cache_only_the_own_layer_is_kept(floating: PI05, observations: Observation) -> None:
    call = record(floating, ACTION, observations)[0]
    other, own = call.kwargs["past_key_values"].layers
    assert other == () and own.keys.shape[0] == len(observations)


def test_the_policy_is_as_before(floating: PI05, observations: Observation) -> None:
    before = {name: tensor.clone() for name, tensor in floating.module.state_dict().items()}
    record(floating, ACTION, observations)
    after = floating.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in floating.module.modules())


@pytest.mark.parametrize(("max_calls", "per_step"), [(100, 5), (12, 3), (11, 2), (1, 1)])
def test_all_steps_are_recorded_equally_often(max_calls: int, per_step: int) -> None:
    calls = record(StepsOfOneLinear(), "action.up", toy_observations(40), max_calls=max_calls)
    assert Counter(call.step for call in calls) == dict.fromkeys(range(4), per_step)


def test_steps_are_recorded_on_different_observations() -> None:
    """Of 40 observations in 5 batches, four steps with one call each see four batches."""
    policy = StepsOfOneLinear()
    chosen = record(policy, "action.up", toy_observations(40), max_calls=4)
    everything = record(policy, "action.up", toy_observations(40), max_calls=100)
    of_a_step = {step: [call.output for call in everything if call.step == step] for step in range(4)}
    places = [place_of(call.output, of_a_step[call.step]) for call in chosen if call.step is not None]
    assert sorted(places) == [0, 1, 2, 3]


def test_a_block_outside_the_steps_is_kept_on_evenly_spaced_batches() -> None:
    class Language(ToyPolicy):
        def sites(self) -> list[InputSite]:
            return [InputSite("q", "language", "language.q", ("language.q",))]

    everything = [call.output for call in record(Language(), "language.q", toy_observations(40))]
    chosen = record(Language(), "language.q", toy_observations(40), max_calls=2)
    assert len(everything) == 5
    assert [place_of(call.output, everything) for call in chosen] == [0, 2]
    assert all(call.step is None for call in chosen)


def place_of(output: Tensor, among: list[Tensor]) -> int:
    return next(i for i, other in enumerate(among) if torch.equal(output, other))


def test_a_block_that_never_ran(floating: PI05, observations: Observation) -> None:
    unused = f"{STACKS}.paligemma.lm_head"
    with pytest.raises(CalibrationError, match=r"lm_head cannot be reconstructed: it never ran on"):
        record(floating, unused, observations[:1])


def test_a_step_that_never_ran() -> None:
    with pytest.raises(CalibrationError, match=r"action\.up .* never ran in denoising step 2"):
        record(StepsOfOneLinear(skip=2), "action.up", toy_observations(3))


def test_a_block_that_depends_on_more_than_its_arguments() -> None:
    class Counting(nn.Linear):
        called = 0

        def forward(self, x: Tensor) -> Tensor:
            self.called += 1
            return super().forward(x) + self.called

    policy = StepsOfOneLinear()
    policy.module.action["up"] = Counting(WIDTH, 32)
    with pytest.raises(CalibrationError, match=r"action\.up cannot be reconstructed: called alone"):
        record(policy, "action.up", toy_observations(3))
