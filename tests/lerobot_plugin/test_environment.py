"""lerobot's own rollout in our environment meets the episodes of our evaluation."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# `importorskip` would import MuJoCo before our module has chosen its OpenGL backend.
if find_spec("metaworld") is None:
    pytest.skip("needs Meta-World", allow_module_level=True)

from lerobot.configs import PreTrainedConfig
from lerobot.envs import env_to_policy_features, make_env
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.scripts.lerobot_eval import eval_policy

import omega_qvla.lerobot_plugin.configuration_omega_qvla  # noqa: F401  # which lerobot's programs import
from omega_qvla.evaluation.metaworld.suite import metaworld_environment
from omega_qvla.evaluation.metaworld.task import CAMERAS, IMAGE_SIZE, TASKS
from omega_qvla.evaluation.rollout import EnvironmentPool, run_block
from omega_qvla.lerobot_plugin import environment
from omega_qvla.lerobot_plugin.environment import MetaWorldRobot, OmegaQVLAMetaWorld
from omega_qvla.policies import load_policy
from omega_qvla.policy import Observation

TASK = "drawer-close-v3"


class Countdown:
    """Solved after as many steps as the seed says; nothing in it moves."""

    def __init__(self, task: str) -> None:
        self.instruction = TASKS[task]
        self.left = 0

    def reset(self, seed: int) -> None:
        self.left = seed

    def step(self, action: np.ndarray) -> bool:
        self.left -= 1
        return self.left == 0

    def proprioception(self) -> np.ndarray:
        return np.zeros(4, np.float32)

    def images(self) -> dict[str, np.ndarray]:
        return {camera: np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 7, np.uint8) for camera in CAMERAS}

    def close(self) -> None:
        pass


class Watched:
    """A policy that remembers what it saw and did."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.seen = policy, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def infer(self, observation: Observation, noise: torch.Tensor, previous: None = None) -> np.ndarray:
        actions = self.policy.infer(observation, noise, previous)
        self.seen.append([*observation.images.values(), observation.state, noise.numpy(), actions])
        assert set(observation.instructions) == {TASKS[TASK]}
        return actions


def evaluated_by_lerobot(policy: Any, robots: int, episodes: int, first_seed: int = 0) -> list[bool]:
    """Success by episode, as `lerobot-eval` finds it."""
    envs = make_env(OmegaQVLAMetaWorld(task=TASK), n_envs=robots)
    nothing = PolicyProcessorPipeline(steps=[])
    before, after = make_pre_post_processors(policy.config)
    with torch.no_grad():
        info = eval_policy(
            envs[TASK][0], policy, nothing, nothing, before, after, n_episodes=episodes, start_seed=first_seed
        )
    envs[TASK][0].close()
    assert [each["seed"] for each in info["per_episode"]] == list(range(first_seed, first_seed + episodes))
    assert [each["sum_reward"] for each in info["per_episode"]] == [float(e["success"]) for e in info["per_episode"]]
    return [each["success"] for each in info["per_episode"]]


def lerobot_policy(directory: Path) -> Any:
    config = PreTrainedConfig.from_pretrained(directory)
    config.pretrained_path = directory
    return make_policy(config, env_cfg=OmegaQVLAMetaWorld(task=TASK))


@pytest.fixture
def eight_steps(monkeypatch: pytest.MonkeyPatch) -> int:
    """The step limit."""
    monkeypatch.setattr(environment, "MAX_STEPS", 8)
    return 8


@pytest.mark.filterwarnings("ignore")
def test_observations_noise_and_actions_are_those_of_our_evaluation(
    quantized: Callable[[str], Path], eight_steps: int
) -> None:
    """Bit for bit, as the batch is of the same size."""
    seeds, directory = (3, 4), quantized("omega-int4")
    theirs, ours = lerobot_policy(directory), Watched(load_policy(directory))
    theirs.policy = Watched(theirs.policy)
    solved = evaluated_by_lerobot(theirs, robots=2, episodes=2, first_seed=seeds[0])
    pool = EnvironmentPool(metaworld_environment)
    episodes = run_block(ours, [(TASK, seed) for seed in seeds], pool, lanes=2, max_steps=eight_steps)
    pool.close()
    assert solved == [episode.success for episode in episodes]
    assert len(theirs.policy.seen) == len(ours.seen) == eight_steps // ours.execute_steps
    for theirs_seen, ours_seen in zip(theirs.policy.seen, ours.seen, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(theirs_seen, ours_seen, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("robots", [1, 2, 3])
def test_episodes_end_as_in_our_evaluation(
    robots: int, quantized: Callable[[str], Path], eight_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is done first, and whether by success, at the limit, or by both in one step."""
    monkeypatch.setattr(environment, "metaworld_environment", Countdown)
    directory, seeds = quantized("omega-int4"), range(5, 11)
    pool = EnvironmentPool(Countdown)
    episodes = run_block(
        load_policy(directory), [(TASK, seed) for seed in seeds], pool, lanes=robots, max_steps=eight_steps
    )
    solved = evaluated_by_lerobot(lerobot_policy(directory), robots, len(seeds), first_seed=seeds[0])
    assert solved == [episode.success for episode in episodes] == [True] * 4 + [False] * 2


def test_what_lerobot_is_told_of_the_environment() -> None:
    config = OmegaQVLAMetaWorld(task=f"{TASK}, reach-v3")
    assert config.tasks() == [TASK, "reach-v3"] and OmegaQVLAMetaWorld().tasks() == list(TASKS)
    features = env_to_policy_features(config)
    assert {name: feature.shape for name, feature in features.items()} == {
        "action": (4,),
        "observation.state": (4,),
        "observation.images.back": (3, IMAGE_SIZE, IMAGE_SIZE),
        "observation.images.front": (3, IMAGE_SIZE, IMAGE_SIZE),
    }
    with pytest.raises(ValueError, match="unknown task 'juggle'; MT10 has"):
        OmegaQVLAMetaWorld(task="juggle")


def test_an_observation_is_what_the_space_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "metaworld_environment", Countdown)
    robot = MetaWorldRobot(TASK)
    observation, _ = robot.reset(seed=99_999)
    assert robot.observation_space.contains(observation)
    assert robot.render().shape == (IMAGE_SIZE, 2 * IMAGE_SIZE, 3)


def test_an_episode_has_a_seed_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "metaworld_environment", Countdown)
    robot = MetaWorldRobot(TASK)
    with pytest.raises(ValueError, match="pass --seed=0"):
        robot.reset()
    with pytest.raises(ValueError, match="seed 500000 is not an evaluation seed"):
        robot.reset(seed=500_000)
