"""Real-time chunking as lerobot asks for it: one call, and a whole rollout on a robot that consists of numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from delivering import delivered
from lerobot.configs import PreTrainedConfig
from lerobot.policies.rtc import RTCConfig
from lerobot.rollout import RolloutConfig, build_rollout_context, create_strategy
from lerobot.rollout.inference import RTCInferenceConfig
from lerobot.rollout.inference.rtc import supports_rtc_inference
from stand_in_robot import StandInRobotConfig
from torch import Tensor

from omega_qvla.lerobot_plugin.modeling_omega_qvla import OmegaQVLAPolicy
from omega_qvla.policy import Observation, PreviousChunk
from tiny_policy import ACTION_DIM, CHUNK, SCALES


@pytest.fixture
def tiny(quantized: Callable[[str], Path]) -> OmegaQVLAPolicy:
    return OmegaQVLAPolicy.from_pretrained(quantized("omega-int4"))


def left_over(robots: int, left: int = 3) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.uniform(-1, 1, (robots, left, ACTION_DIM)) * SCALES).astype(np.float32)


def test_a_chunk_continues_the_one_before(tiny: OmegaQVLAPolicy, observations: Observation, noise: Tensor) -> None:
    batch, actions = delivered(observations), left_over(8)
    assert supports_rtc_inference(tiny)
    found = tiny.predict_action_chunk(
        batch, noise, inference_delay=2, prev_chunk_left_over=torch.from_numpy(actions), execution_horizon=3
    )
    expected = tiny.policy.infer(observations, noise, PreviousChunk(actions, 2, 3))
    assert np.array_equal(found.numpy(), expected)
    first = delivered(observations[:1])
    one = tiny.predict_action_chunk(first, noise[:1], prev_chunk_left_over=torch.from_numpy(actions[0]))
    assert np.array_equal(one.numpy(), tiny.policy.infer(observations[:1], noise[:1], PreviousChunk(actions[:1], 0)))


def test_what_lerobot_fills_up_is_not_continued(
    tiny: OmegaQVLAPolicy, observations: Observation, noise: Tensor
) -> None:
    """It makes left-overs as long as the horizon with zeros, and does not shorten the delay."""
    batch, actions = delivered(observations[:1]), left_over(1, left=2)
    filled = torch.zeros(6, ACTION_DIM)
    filled[:2] = torch.from_numpy(actions[0])
    expected = tiny.policy.infer(observations[:1], noise[:1], PreviousChunk(actions, 2))
    found = tiny.predict_action_chunk(batch, noise[:1], inference_delay=5, prev_chunk_left_over=filled)
    assert np.array_equal(found.numpy(), expected)
    free = tiny.predict_action_chunk(batch, noise[:1], inference_delay=5, prev_chunk_left_over=torch.zeros(6, 4))
    assert np.array_equal(free.numpy(), tiny.policy.infer(observations[:1], noise[:1]))


def test_settings_are_those_that_lerobot_sets(
    tiny: OmegaQVLAPolicy, observations: Observation, noise: Tensor, quantized: Callable[[str], Path]
) -> None:
    batch, actions = delivered(observations), torch.from_numpy(left_over(8))
    free = tiny.predict_action_chunk(batch, noise)
    drawn = tiny.predict_action_chunk(batch, noise, inference_delay=1, prev_chunk_left_over=actions)
    for settings, expected in ((RTCConfig(enabled=False), free), (RTCConfig(), drawn)):
        tiny.config.rtc_config = settings
        tiny.init_rtc_processor()
        found = tiny.predict_action_chunk(batch, noise, inference_delay=1, prev_chunk_left_over=actions)
        assert torch.equal(found, expected)
    options = ["--rtc_config.max_guidance_weight=0.1"]
    config = PreTrainedConfig.from_pretrained(quantized("omega-int4"), cli_overrides=options)
    weak = OmegaQVLAPolicy.from_pretrained(quantized("omega-int4"), config=config)
    found = weak.predict_action_chunk(batch, noise, inference_delay=1, prev_chunk_left_over=actions)
    assert 0 < (found - free).abs().max() < (drawn - free).abs().max()


def test_a_policy_that_cannot_continue_is_refused(
    tiny: OmegaQVLAPolicy, observations: Observation, noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tiny.policy), "previous_actions", lambda self: 0)
    assert not supports_rtc_inference(tiny)
    with pytest.raises(ValueError, match="takes no previous chunk; pi0, pi0.5".replace(".", r"\.")):
        tiny.predict_action_chunk(delivered(observations), noise, prev_chunk_left_over=torch.ones(2, ACTION_DIM))


def test_a_rollout_of_lerobot(quantized: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `lerobot-rollout --inference.type=rtc` does once its options are parsed, until some actions were sent."""
    monkeypatch.setattr(sys, "argv", ["lerobot-rollout"])
    config = PreTrainedConfig.from_pretrained(quantized("omega-int4"))
    config.pretrained_path = quantized("omega-int4")
    rollout = RolloutConfig(
        robot=StandInRobotConfig(),
        policy=config,
        inference=RTCInferenceConfig(rtc=RTCConfig(execution_horizon=3), queue_threshold=CHUNK),
        fps=2.0,  # an inference takes no longer than an action, also on a busy machine
        duration=60.0,
        task="open the door",
        return_to_initial_position=False,
    )
    enough = Event()
    context = build_rollout_context(rollout, enough)
    policy, robot = context.policy.policy.policy, context.hardware.robot_wrapper.inner
    infer, asked, chunks = policy.infer, list[PreviousChunk | None](), list[np.ndarray]()

    def noted(observation: Observation, noise: Tensor, previous: PreviousChunk | None = None) -> np.ndarray:
        chunks.append(infer(observation, noise, previous))
        asked.append(previous)
        if len(robot.sent) >= 2:
            enough.set()
        return chunks[-1]

    monkeypatch.setattr(policy, "infer", noted)
    strategy = create_strategy(rollout.strategy)
    strategy.setup(context)
    try:
        strategy.run(context)
    finally:
        strategy.teardown(context)
    assert enough.is_set() and not strategy._engine.failed and policy.chunking.execution_horizon == 3
    pairs = zip(asked[1:], chunks[:-1], chunks[1:], strict=True)
    continued = [(previous, before, after) for previous, before, after in pairs if previous is not None]
    assert asked[0] is None and continued
    for previous, before, after in continued:
        left, delay = previous.actions.shape[1], previous.delay
        given = [np.array_equal(before[:, i : i + left], previous.actions) for i in range(CHUNK)]
        assert any(given)  # in physical units, as they were answered
        assert delay
        assert (np.abs(after[:, :delay] - previous.actions[:, :delay]) / SCALES).max() < 0.5
    answered = np.concatenate([chunk[0] for chunk in chunks])
    assert all((np.abs(answered - np.array(action)).max(1) < 1e-5).any() for action in robot.sent)
