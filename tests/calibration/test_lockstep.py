"""Inferences side by side: nothing that they compute depends on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.calibration import CalibrationError, Needs, SiteStatistics, collect, visit
from omega_qvla.calibration.lockstep import in_lockstep, meet
from omega_qvla.calibration.spill import Spill
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import Observation
from toy_policy import ToyPolicy, toy_observations

EVERYTHING = Needs(hessian=True, samples=True)


def assert_same(found: SiteStatistics, expected: SiteStatistics) -> None:
    assert found.name == expected.name and found.tokens == expected.tokens and found.seen == expected.seen
    for one, other in ((found.peak, expected.peak), (found.magnitude, expected.magnitude)):
        assert one is not None and other is not None and torch.equal(one, other)
    assert found.hessian is not None and expected.hessian is not None
    assert torch.equal(found.hessian, expected.hessian)
    assert all(torch.equal(found.samples[step], expected.samples[step]) for step in expected.samples)


def test_all_reach_a_point_before_any_goes_on() -> None:
    log: list[str] = []

    def inference(name: str) -> Callable[[], None]:
        def run() -> None:
            for point in "ab":
                log.append(f"{name} at {point}")
                meet(point)
            log.append(f"{name} ends")

        return run

    for point in in_lockstep([inference("1"), inference("2")]):
        log.append(point)
    assert log == ["1 at a", "2 at a", "a", "1 at b", "2 at b", "b", "1 ends", "2 ends"]


def test_what_is_abandoned_is_unwound() -> None:
    log: list[str] = []

    def inference() -> None:
        try:
            meet("a")
        finally:
            log.append("unwound")

    for _ in in_lockstep([inference, inference]):
        break
    assert log == ["unwound", "unwound"]


def test_inferences_that_part_ways_are_named() -> None:
    with pytest.raises(CalibrationError, match="some reached a, others the end"):
        list(in_lockstep([lambda: meet("a"), lambda: None]))
    with pytest.raises(CalibrationError, match="some reached a, others b"):
        list(in_lockstep([lambda: meet("a"), lambda: meet("b")]))


def test_an_error_in_one_ends_all() -> None:
    def fails() -> None:
        meet("a")
        raise ValueError("the camera is broken")

    with pytest.raises(ValueError, match="camera is broken"):
        list(in_lockstep([lambda: meet("a"), fails]))


def test_meetings_change_no_statistic(floating: PI05, observations: Observation) -> None:
    needs = dict.fromkeys(floating.sites(), EVERYTHING)
    expected = collect(floating, needs, observations[:4], noise_seed=0)
    language = [site.name for site in floating.sites() if site.part == "language"]
    visited = visit(floating, needs, observations[:4], noise_seed=0, batch_size=8, meetings=language)
    found = {statistics.name: statistics for statistics in visited}
    assert found.keys() == expected.keys()
    for name, statistics in found.items():
        assert_same(statistics, expected[name])


@pytest.mark.parametrize("allowance", [0, 2**16, 2**40])
def test_spilling_changes_no_statistic(
    floating: PI05, observations: Observation, tmp_path: Path, allowance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omega_qvla.calibration.spill._SMALLEST", 64)
    needs = dict.fromkeys(floating.sites(), EVERYTHING)
    language = [site.name for site in floating.sites() if site.part == "language"]
    spill = Spill(tmp_path, allowance, floating.module)
    plain, spilled = (
        list(visit(floating, needs, observations[:3], noise_seed=0, batch_size=1, meetings=language, keeper=keeper))
        for keeper in (None, spill)
    )
    for one, other in zip(plain, spilled, strict=True):
        assert_same(one, other)
    assert (spill.written > 0) == (allowance < 2**40)
    assert not list(tmp_path.iterdir())


def test_statistics_come_when_the_layer_has_been_passed() -> None:
    """Those of the language part while nothing of the action part has run."""
    policy = ToyPolicy()
    ran: list[str] = []
    handles = [
        policy.module.get_submodule(site.linears[0]).register_forward_pre_hook(
            lambda module, inputs, name=site.name: ran.append(name)
        )
        for site in policy.sites()
    ]
    visited = visit(
        policy,
        dict.fromkeys(policy.sites(), EVERYTHING),
        toy_observations(20),
        noise_seed=0,
        meetings=["language.input"],
    )
    assert next(visited).name == "language.input"
    assert ran == ["language.input"] * 3
    assert [statistics.name for statistics in visited] == ["action.input", "action.hidden"]
    for handle in handles:
        handle.remove()


def test_it_ends_when_nothing_more_is_needed() -> None:
    policy = ToyPolicy()
    site = policy.sites()[0]
    ended: list[int] = []
    list(
        visit(
            policy,
            {site: EVERYTHING},
            toy_observations(20),
            noise_seed=0,
            meetings=[site.name],
            on_batch=lambda: ended.append(1),
        )
    )
    assert len(ended) == 3
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in policy.module.modules())
    assert not policy.step.running and torch.is_grad_enabled()


def test_what_takes_a_linears_place_answers_from_then_on() -> None:
    """For the call that waits, and for all later ones."""

    class Doubled(nn.Module):
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, 2 * self.weight, 2 * self.bias)

    def inputs_of_the_head(policy: ToyPolicy, replace: bool) -> Tensor:
        needs = dict.fromkeys(policy.sites(), EVERYTHING)
        layers = policy.module.get_submodule("language")
        for statistics in visit(policy, needs, toy_observations(20), noise_seed=0, meetings=["language.input"]):
            if statistics.name == "language.input" and replace:
                for leaf in ("q", "k"):
                    setattr(layers, leaf, Doubled(layers.get_submodule(leaf)))
            if statistics.name == "action.input":
                return statistics.samples[0]
        raise AssertionError

    doubled = ToyPolicy()
    with torch.no_grad():
        for leaf in ("q", "k"):
            for parameter in doubled.module.get_submodule(f"language.{leaf}").parameters():
                parameter.mul_(2)
    assert torch.equal(inputs_of_the_head(ToyPolicy(), True), inputs_of_the_head(doubled, False))


def test_a_language_layer_that_runs_twice_is_named() -> None:
    class Twice(ToyPolicy):
        def differentiable_actions(self, observation: Observation, noise: Tensor) -> Tensor:
            super().differentiable_actions(observation, noise)
            return super().differentiable_actions(observation, noise)

    policy = Twice()
    needs = dict.fromkeys(policy.sites(), EVERYTHING)
    with pytest.raises(CalibrationError, match=r"language\.input runs more than once per inference"):
        list(visit(policy, needs, toy_observations(4), noise_seed=0, meetings=["language.input"]))
