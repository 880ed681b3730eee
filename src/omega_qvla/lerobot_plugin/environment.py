"""The episodes of `omega-qvla evaluate` as an environment of lerobot.

lerobot has a Meta-World of its own, with one camera, other sizes and 500 steps. The bundled policy was trained in
ours (`evaluation.metaworld`), and here lerobot's programs find it: the same initial states by seed, the same cameras,
the same step limit, and an end at the first success.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from omega_qvla.evaluation.metaworld.suite import MAX_STEPS, metaworld_environment
from omega_qvla.evaluation.rollout import Environment
from omega_qvla.evaluation.seeds import EVALUATION_SEEDS, check_within
from omega_qvla.lerobot_plugin import episode_key

ALL_TASKS = "mt10"
STEPS_PER_SECOND = 80
"""Meta-World's control rate: five steps of physics of 2.5 ms."""
_STATE_DIM = 4


@EnvConfig.register_subclass("omega_qvla_metaworld")
@dataclass
class OmegaQVLAMetaWorld(EnvConfig):
    """MT10 with two cameras. `task`: names separated by commas, or mt10 for all; each is a group of its own.

    Raises `ValueError` for a task that is not in MT10, `ImportError` if Meta-World is not installed.
    """

    task: str | None = ALL_TASKS
    fps: int = STEPS_PER_SECOND
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from omega_qvla.evaluation.metaworld.task import ACTION_DIM, CAMERAS, IMAGE_SIZE, TASKS

        if unknown := [task for task in self.tasks() if task not in TASKS]:
            raise ValueError(f"unknown task {unknown[0]!r}; MT10 has {', '.join(TASKS)}")
        shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (_STATE_DIM,)),
            **{f"pixels/{camera}": PolicyFeature(FeatureType.VISUAL, shape) for camera in CAMERAS},
        }
        self.features_map = {
            ACTION: ACTION,
            "agent_pos": OBS_STATE,
            **{f"pixels/{camera}": f"{OBS_IMAGES}.{camera}" for camera in CAMERAS},
        }

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}

    def tasks(self) -> list[str]:
        """The names of the tasks."""
        from omega_qvla.evaluation.metaworld.task import TASKS

        chosen = self.task or ALL_TASKS
        return list(TASKS) if chosen == ALL_TASKS else [task.strip() for task in chosen.split(",") if task.strip()]

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """`n_envs` robots of each task; in processes of their own if lerobot asks for that."""
        return {task: {0: _robots(task, n_envs, use_async_envs and n_envs > 1)} for task in self.tasks()}


def _robots(task: str, count: int, in_processes: bool) -> gym.vector.VectorEnv:
    makers = [partial(MetaWorldRobot, task)] * count
    if in_processes:
        return _LazyAsyncVectorEnv(makers)
    # A robot that is done waits for the others of its batch instead of beginning an episode that nobody counts.
    frozen = [freeze_after_episode_end(maker) for maker in makers]
    return gym.vector.SyncVectorEnv(frozen, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)


class MetaWorldRobot(gym.Env):
    """One robot in one task, whose episodes are named by the seed of `reset`. The reward is 1 at success, else 0."""

    def __init__(self, task: str) -> None:
        from omega_qvla.evaluation.metaworld.task import ACTION_DIM, CAMERAS, IMAGE_SIZE, TASKS

        self.metadata = {"render_modes": ["rgb_array"], "render_fps": STEPS_PER_SECOND}
        self.render_mode = "rgb_array"
        self.task, self.task_description = task, TASKS[task]
        self._max_episode_steps = MAX_STEPS
        pixels = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict(dict.fromkeys(CAMERAS, pixels)),
                "agent_pos": spaces.Box(-np.inf, np.inf, (_STATE_DIM,), np.float32),
                episode_key.OBSERVED_AS: spaces.Box(0, episode_key.LARGEST, episode_key.SHAPE, np.float32),
            }
        )
        self.action_space = spaces.Box(-1, 1, (ACTION_DIM,), np.float32)
        self._environment: Environment | None = None
        self._seed, self._steps = 0, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin the episode named by `seed`. Raises `ValueError` without one, or if it is not for evaluation."""
        if seed is None:
            raise ValueError("an episode is named by its seed; pass --seed=0, or another one")
        check_within([seed], EVALUATION_SEEDS, "evaluation")
        if self._environment is None:  # made where it is used: a renderer belongs to its process
            self._environment = metaworld_environment(self.task)
        self._environment.reset(seed)
        self._seed, self._steps = seed, 0
        return self._observation(self._environment), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action [4], clipped to [-1, 1]."""
        assert self._environment is not None, "a robot is reset before it acts"
        success = bool(self._environment.step(action))
        self._steps += 1
        over = not success and self._steps == self._max_episode_steps
        return self._observation(self._environment), float(success), success, over, {"is_success": success}

    def render(self) -> np.ndarray:
        """What both cameras saw last, side by side, uint8 [H, 2 W, 3]."""
        return np.concatenate(list(self._seen.values()), axis=1)

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def _observation(self, environment: Environment) -> dict[str, Any]:
        self._seen = environment.images()
        return {
            "pixels": self._seen,
            "agent_pos": environment.proprioception().copy(),
            episode_key.OBSERVED_AS: episode_key.to_observation(self.task, self._seed),
        }
