"""A task of Meta-World in lerobot's own environment: one camera, 480 pixels, 500 steps.

lerobot's policies for Meta-World are trained on what it shows (the data set `lerobot/metaworld_mt50`), and
`lerobot-eval --env.type=metaworld` judges them there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from omega_qvla.evaluation.metaworld.task import ACTION_DIM  # chooses MuJoCo's renderer before lerobot imports it

try:
    from lerobot.envs.metaworld import DIFFICULTY_TO_TASKS, TASK_DESCRIPTIONS, MetaworldEnv
except ImportError as error:
    raise ImportError(
        f"lerobot's Meta-World needs `pip install 'omega-qvla[policies,metaworld]'`; {error}"
    ) from error

TASKS: dict[str, str] = TASK_DESCRIPTIONS
"""All tasks and their instructions."""
GROUPS: dict[str, list[str]] = DIFFICULTY_TO_TASKS
"""Difficulty to its tasks."""
MODEL_CAMERA = "corner2"
"""The simulator's camera, which lerobot moves and whose images it turns by 180°."""
IMAGE_SIZE = 480
"""Side of the square images, in pixels."""
MAX_STEPS = 500
"""Step limit of an episode, Meta-World's own."""
CAMERAS = ("image", "camera1", "base_0_rgb")
"""What checkpoints call the camera: those trained on lerobot's data, SmolVLA's and openpi's. A policy takes the name
that it knows."""


class LerobotMetaWorldTask:
    """One of Meta-World's fifty tasks."""

    def __init__(self, name: str) -> None:
        """Raises `ValueError` for a task that lerobot does not have."""
        if name not in TASKS:
            raise ValueError(f"unknown Meta-World task {name!r}; lerobot has {', '.join(TASKS)}")
        self.name = name
        self.instruction: str = TASKS[name]
        self._env: MetaworldEnv | None = None
        self._observation: dict[str, Any] = {}

    def reset(self, seed: int) -> None:
        """Start the episode whose initial state is named by `seed`."""
        # In an environment that was used before, the first image shows traces of the episode before.
        self.close()
        self._env = MetaworldEnv(self.name, camera_name=MODEL_CAMERA, obs_type="pixels_agent_pos")
        self._observation, _ = self._env.reset(seed=seed)

    def step(self, action: np.ndarray) -> bool:
        """Execute one action [4]; returns whether the task is solved. Raises `ValueError` for another width."""
        if action.shape != (ACTION_DIM,):
            raise ValueError(
                f"the policy's actions have {action.shape[-1]} dimensions, Meta-World's robot {ACTION_DIM}"
            )
        assert self._env is not None, "a robot is reset before it acts"
        self._observation, _, _, _, info = self._env.step(action)
        return bool(info["is_success"])

    def proprioception(self) -> np.ndarray:
        """Hand position in metres and gripper opening in [0, 1], float32 [4]."""
        return np.asarray(self._observation["agent_pos"], np.float32)

    def images(self) -> dict[str, np.ndarray]:
        """The camera under every name that policies have for it, uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]."""
        return dict.fromkeys(CAMERAS, self._observation["pixels"])

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None
