"""A chunk that continues the one before is what lerobot's real-time chunking makes, also on integers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import RTCAttentionSchedule
from lerobot.policies.rtc import RTCConfig
from torch import Tensor

from omega_qvla.policies import load_policy, open_policy
from omega_qvla.policies.lerobot_policy import LerobotPolicy
from omega_qvla.policy import Observation, PreviousChunk
from tiny_policy import ACTION_DIM, CHUNK, FAMILIES, SCALES

Source = Callable[[str], Path]
Opened = Callable[[str], LerobotPolicy]
Packed = Callable[[str, str], Path]

every_family = pytest.mark.parametrize("family", FAMILIES)


def previous(robots: int = 8, left: int = CHUNK, delay: int = 2, horizon: int | None = None) -> PreviousChunk:
    actions = np.random.default_rng(3).uniform(-1, 1, (robots, left, ACTION_DIM)) * SCALES
    return PreviousChunk(actions.astype(np.float32), delay, horizon)


def edited(source: Path, out: Path, file: str, edit: Callable[[Any], None]) -> Path:
    """A copy of a checkpoint with a changed JSON file."""
    shutil.copytree(source, out)
    document = json.loads((out / file).read_text())
    edit(document)
    (out / file).write_text(json.dumps(document))
    return out


@every_family
@pytest.mark.parametrize("schedule", [RTCAttentionSchedule.LINEAR, RTCAttentionSchedule.EXP])
def test_it_is_what_lerobot_computes(
    family: str, schedule: RTCAttentionSchedule, source: Source, observations: Observation, noise: Tensor
) -> None:
    """lerobot's own policy without what we attach to it, and its processors, one by one on normalized actions."""
    policy, earlier = open_policy(source(family)), previous(left=3, delay=1)
    policy.chunking = RTCConfig(prefix_attention_schedule=schedule, max_guidance_weight=5.0, execution_horizon=3)
    actions = policy.infer(observations, noise, earlier)
    for ours in ("denoise_step", "sample_actions"):
        delattr(policy.module.model, ours)
    with torch.no_grad():
        chunk = policy.module.predict_action_chunk(
            policy._preprocessor(policy._batch(observations)),
            noise=noise,
            inference_delay=1,
            prev_chunk_left_over=torch.from_numpy(earlier.actions / np.array(SCALES, np.float32)),
        )
    assert np.allclose(actions, policy._postprocessor(chunk).numpy(), rtol=1e-4, atol=1e-4)


@every_family
def test_without_a_previous_chunk_nothing_changes(
    family: str, source: Source, opened: Opened, observations: Observation, noise: Tensor
) -> None:
    policy = open_policy(source(family))
    before = policy.infer(observations, noise)
    policy.module.config.rtc_config = None
    assert np.array_equal(policy.infer(observations, noise), before)  # as lerobot has it by default
    assert not np.array_equal(opened(family).infer(observations, noise, previous()), before)
    assert np.array_equal(opened(family).infer(observations, noise), before)


@every_family
def test_the_last_step_leaves_a_known_part_of_the_way(
    family: str, source: Source, observations: Observation, noise: Tensor
) -> None:
    """From the network's last estimate to the previous chunk, of N steps the last goes w / N of the way, with
    w = (1 + (N - 1)²) / (N - 1) but no more than `max_guidance_weight`: for N = 10, 8.9 % of the way are left."""
    policy, earlier, velocities = open_policy(source(family)), previous(delay=CHUNK), []
    denoise_step = policy._denoise_step
    policy._denoise_step = lambda **arguments: velocities.append(denoise_step(**arguments)) or velocities[-1]
    for most in (100.0, 4.0):
        policy.chunking = RTCConfig(max_guidance_weight=most)
        actions = policy.infer(observations, noise, earlier)
        estimate = (policy.partial[-1] - velocities[-1] / 10)[..., :ACTION_DIM].detach().numpy() * SCALES
        left = 1 - min(most, 82 / 9) / 10
        assert np.allclose(actions - earlier.actions, left * (estimate - earlier.actions), atol=1e-4)


def test_few_steps_do_not_shoot_beyond_the_previous_chunk(
    source: Source, observations: Observation, noise: Tensor, tmp_path: Path
) -> None:
    def one_step(config: dict[str, Any]) -> None:
        config["num_inference_steps"] = 1

    policy, earlier = (
        open_policy(edited(source("pi05"), tmp_path / "1", "config.json", one_step)),
        previous(delay=CHUNK),
    )
    assert np.allclose(policy.infer(observations, noise, earlier), earlier.actions, atol=1e-5)


@every_family
def test_the_executed_actions_are_held_and_those_after_the_horizon_are_free(
    family: str, opened: Opened, observations: Observation, noise: Tensor
) -> None:
    earlier = previous(delay=1, horizon=2)
    free, drawn = (opened(family).infer(observations, noise, given) for given in (None, earlier))
    part = np.abs(drawn - earlier.actions).mean((0, 2)) / np.abs(free - earlier.actions).mean((0, 2))
    assert part[0] < 0.1 and part[2:].min() > 0.7


@every_family
def test_a_delay_beyond_the_configured_horizon_is_held_too(
    family: str, source: Source, opened: Opened, observations: Observation, noise: Tensor
) -> None:
    policy = open_policy(source(family))
    policy.chunking = RTCConfig(execution_horizon=1)
    expected = opened(family).infer(observations, noise, previous(delay=3, horizon=3))
    assert np.array_equal(policy.infer(observations, noise, previous(delay=3)), expected)


@every_family
def test_integers_and_simulation_agree(family: str, packed: Packed, observations: Observation, noise: Tensor) -> None:
    integer, simulated = (load_policy(packed(family, "omega-int4"), how) for how in ("integer", "simulated"))
    actions = integer.infer(observations, noise, previous())
    assert np.array_equal(actions, simulated.infer(observations, noise, previous()))
    assert not np.array_equal(actions, integer.infer(observations, noise))


@every_family
def test_no_gradients_are_recorded_in_the_network(
    family: str, source: Source, observations: Observation, noise: Tensor
) -> None:
    """lerobot records them around every denoising step, where a whole graph would be made for nothing."""
    policy, seen = open_policy(source(family)), []
    layer = policy.module.get_submodule(policy.sites()[-1].linears[0])
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    policy.infer(observations[:1], noise[:1], previous(robots=1))
    assert seen == [False] * 10
    assert policy.differentiable_actions(observations[:1], noise[:1]).requires_grad and seen[10:] == [True] * 10


@every_family
def test_physical_units_come_back_as_the_policy_had_them(
    family: str, opened: Opened, observations: Observation
) -> None:
    policy, earlier = opened(family), previous()
    _, normalized = policy._with_previous(observations, earlier)
    assert np.allclose(normalized.numpy() * SCALES, earlier.actions, atol=1e-5)
    assert np.allclose(policy.physical(normalized).numpy(), earlier.actions, atol=1e-5)


def test_relative_actions_come_back_relative_to_this_state(
    source: Source, opened: Opened, observations: Observation, noise: Tensor, tmp_path: Path
) -> None:
    def switch_on(pipeline: dict[str, Any]) -> None:
        for step in pipeline["steps"]:
            if "enabled" in step["config"]:
                step["config"]["enabled"] = True

    out = edited(source("pi0"), tmp_path / "relative", "policy_preprocessor.json", switch_on)
    file = out / "policy_postprocessor.json"
    document = json.loads(file.read_text())
    switch_on(document)
    file.write_text(json.dumps(document))
    offset, earlier = observations.state[:, None], previous()
    actions = open_policy(out).infer(observations, noise, replace(earlier, actions=earlier.actions + offset))
    assert np.allclose(actions, opened("pi0").infer(observations, noise, earlier) + offset, rtol=1e-4, atol=1e-4)


# What cannot be continued


def test_what_is_no_previous_chunk(opened: Opened, observations: Observation, noise: Tensor) -> None:
    actions = previous().actions
    for given, delay, horizon, sentence in (
        (actions[0], 0, None, r"is float32 \[4, 4\] instead of float32 \[batch"),
        (actions.astype(np.float64), 0, None, "is float64"),
        (actions[:, :0], 0, None, "leave it out if nothing of it is left"),
        (actions * np.float32(np.nan), 0, None, "NaN or infinity"),
        (actions, 5, None, "the delay is 5, but 4 actions"),
        (actions, -1, None, "the delay is -1"),
        (actions, 3, 2, "must be at least 3"),
        (actions, 0, 0, "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            PreviousChunk(given, delay, horizon)
    for wrong in (previous(left=CHUNK + 1), previous(robots=7), replace(previous(), actions=actions[..., :2])):
        with pytest.raises(ValueError, match=r"instead of \[8, 1 to 4, 4\]"):
            opened("pi05").infer(observations, noise, wrong)


def test_a_policy_that_cannot_continue_says_who_can(
    source: Source, observations: Observation, noise: Tensor, tmp_path: Path
) -> None:
    def switched_off(config: dict[str, Any]) -> None:
        config["rtc_config"] = {"enabled": False}

    def without_a_way_back(pipeline: dict[str, Any]) -> None:
        pipeline["steps"] = [s for s in pipeline["steps"] if s["registry_name"] != "relative_actions_processor"]

    assert open_policy(source("pi0")).interface().previous_actions == CHUNK
    for file, edit in (("config.json", switched_off), ("policy_preprocessor.json", without_a_way_back)):
        policy = open_policy(edited(source("pi0"), tmp_path / file, file, edit))
        assert policy.interface().previous_actions == 0
        with pytest.raises(ValueError, match=r"SmolVLA and GR00T N1\.7 do real-time chunking"):
            policy.infer(observations, noise, previous())
