"""Statistics against a direct computation on what the hooks of this test saw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omega_qvla.calibration import CalibrationError, Needs, SiteStatistics, collect, statistics
from omega_qvla.calibration.batches import calibration_noise
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import Observation
from toy_policy import ToyPolicy, toy_observations

EVERYTHING = Needs(hessian=True, samples=True)


def collect_all(policy: Any, observations: Observation, needs: Needs = EVERYTHING) -> dict[str, SiteStatistics]:
    return collect(policy, dict.fromkeys(policy.sites(), needs), observations, noise_seed=0)


def seen_by_hooks(policy: Any, observations: Observation) -> dict[str, dict[int | None, Tensor]]:
    """Inputs [tokens, in] of every site by step, from one batch."""
    seen: dict[str, dict[int | None, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def hook(name: str) -> Callable[..., None]:
        def listen(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            step = policy.step.current if policy.step.running else None
            seen[name][step].append(inputs[0].flatten(0, -2).clone())

        return listen

    handles = [
        policy.module.get_submodule(site.linears[-1]).register_forward_pre_hook(hook(site.name))
        for site in policy.sites()
    ]
    policy.infer(observations, calibration_noise(policy, 0, 0, len(observations)))
    for handle in handles:
        handle.remove()
    return {name: {step: torch.cat(parts) for step, parts in by.items()} for name, by in seen.items()}


def assert_equal_to_direct(policy: Any, observations: Observation) -> None:
    gathered, direct = collect_all(policy, observations), seen_by_hooks(policy, observations)
    assert set(gathered) == set(direct)
    for name, by_step in direct.items():
        x, found = torch.cat(list(by_step.values())).double(), gathered[name]
        assert found.tokens == len(x)
        assert found.peak is not None and torch.allclose(found.peak.double(), x.abs().amax(0), rtol=1e-6)
        assert found.hessian is not None
        norm = (x.t() @ x).norm()
        assert (found.hessian.double() - x.t() @ x).norm() < 1e-5 * norm
        assert set(found.samples) == set(by_step)
        for step, tokens in by_step.items():
            assert torch.equal(found.samples[step], tokens)


def test_they_equal_a_direct_computation_on_the_toy() -> None:
    assert_equal_to_direct(ToyPolicy(), toy_observations(5))


def test_they_equal_a_direct_computation_on_pi05(floating: PI05, observations: Observation) -> None:
    assert_equal_to_direct(floating, observations[:4])


def test_steps_of_pi05(floating: PI05, observations: Observation) -> None:
    """Vision and language run once per inference and have no step; the action part has all ten."""
    gathered = collect_all(floating, observations[:2])
    for site in floating.sites():
        steps = set(range(10)) if site.part == "action" else {None}
        assert set(gathered[site.name].seen) == steps


def test_batches_do_not_matter() -> None:
    policy, observations = ToyPolicy(), toy_observations(20)
    whole = collect_all(policy, observations)["action.input"]
    first = collect_all(policy, observations[:16])["action.input"]
    assert whole.peak is not None and first.peak is not None and (whole.peak >= first.peak).all()
    for step in range(policy.denoising_steps):
        assert torch.equal(whole.samples[step][: 16 * 3], first.samples[step])


def test_noise_depends_on_the_observation_and_the_seed_alone() -> None:
    policy = ToyPolicy()
    assert torch.equal(calibration_noise(policy, 3, 0, 8)[5:], calibration_noise(policy, 3, 5, 3))
    assert not torch.equal(calibration_noise(policy, 3, 0, 1), calibration_noise(policy, 4, 0, 1))


def test_only_what_is_needed_is_kept() -> None:
    found = collect_all(ToyPolicy(), toy_observations(2), Needs())["action.input"]
    assert found.peak is not None and found.hessian is None and not found.samples


def test_hooks_are_removed_even_after_an_error() -> None:
    policy = ToyPolicy(skip="language")
    with pytest.raises(CalibrationError):
        collect_all(policy, toy_observations(2))
    assert not any(module._forward_pre_hooks for module in policy.module.modules())


def test_a_layer_that_never_ran() -> None:
    with pytest.raises(CalibrationError, match=r"language\.input has no statistics: it never ran"):
        collect_all(ToyPolicy(skip="language"), toy_observations(2))


def test_a_step_that_was_never_seen() -> None:
    with pytest.raises(CalibrationError, match=r"action\.input has no statistics for denoising step 2"):
        collect_all(ToyPolicy(skip=2), toy_observations(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite(bad: float) -> None:
    observations = toy_observations(3)
    observations.state[1, 2] = bad
    with pytest.raises(CalibrationError, match=r"the input of language\.input contains NaN or infinity"):
        collect_all(ToyPolicy(), observations)


def test_a_layer_that_produces_nan() -> None:
    policy = ToyPolicy()
    with torch.no_grad():
        policy.module.get_parameter("action.up.weight")[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"the input of action\.hidden contains NaN or infinity"):
        collect_all(policy, toy_observations(2))


def test_no_observations() -> None:
    with pytest.raises(CalibrationError, match="there are no calibration observations"):
        collect_all(ToyPolicy(), toy_observations(0))


def test_a_missing_camera_is_named(floating: PI05, observations: Observation) -> None:
    blind = Observation({"back": observations.images["back"]}, observations.state, observations.instructions)
    with pytest.raises(ValueError, match="camera 'front' is missing; the policy was trained with back, front"):
        collect_all(floating, blind)


def test_the_reservoir_is_a_uniform_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 tokens 40 are kept, 60 times over: each token about 6 times, early and late ones alike."""
    monkeypatch.setattr(statistics, "MAX_SAMPLES", 40)
    tokens, counts = torch.arange(400.0)[:, None], torch.zeros(400)
    for seed in range(60):
        gathered = SiteStatistics(f"site {seed}", Needs(samples=True))
        for part in tokens.split(37):
            gathered.add(part, 0)
        kept = gathered.samples[0][:, 0].long()
        assert len(kept) == 40 == len(kept.unique())
        counts[kept] += 1
    quarters = counts.view(4, 100).sum(1)
    assert quarters.sum() == 2400
    assert ((quarters - 600).abs() < 100).all()  # about five standard deviations


def test_the_reservoir_counts_steps_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_SAMPLES", 5)
    found = collect_all(ToyPolicy(), toy_observations(10))
    assert {step: len(x) for step, x in found["action.input"].samples.items()} == dict.fromkeys(range(4), 5)
    assert found["action.input"].seen == dict.fromkeys(range(4), 30)
