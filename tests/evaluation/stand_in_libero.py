"""A robot in place of LIBERO's simulator, with the interface of its `OffScreenRenderEnv`.

Its hand starts where the initial state says and goes where actions push it; the task is solved near the origin. Its
images are upside down, as LIBERO's are: a red pixel is in the corner that a turned image shows at the lower right.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

HORIZON = 1000
REACHED = 0.05


class OffScreenRenderEnv:
    made: list[OffScreenRenderEnv]

    def __init__(
        self, bddl_file_name: str, camera_heights: int, camera_widths: int, control_freq: int, hard_reset: bool
    ) -> None:
        assert Path(bddl_file_name).is_file()
        self.size = (camera_heights, camera_widths)
        self.robots = [SimpleNamespace(controller=SimpleNamespace(ee_ori_mat=np.eye(3), use_delta=None))]
        self.env = SimpleNamespace(_get_observations=self.observation)
        self.seeds: list[int | None] = []
        self.states: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.hand = np.zeros(3)
        self.closed = False
        self.made.append(self)

    def seed(self, seed: int | None) -> None:
        self.seeds.append(seed)

    def reset(self) -> dict[str, Any]:
        self.actions = []
        return self.observation()

    def set_init_state(self, state: np.ndarray) -> dict[str, Any]:
        self.states.append(state)
        self.hand = 0.2 + 0.1 * np.abs(np.resize(state[1:4], 3)) % 1
        return self.observation()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        if len(self.actions) == HORIZON:
            raise ValueError("executing action in terminated episode")  # robosuite's words
        self.actions.append(np.array(action, np.float64))
        self.hand = self.hand + 0.1 * np.clip(self.actions[-1][:3], -1, 1)
        return self.observation(), 0.0, self.check_success(), {}

    def check_success(self) -> bool:
        return bool(np.abs(self.hand).max() < REACHED)

    def observation(self) -> dict[str, Any]:
        image = np.full((*self.size, 3), 40, np.uint8)
        image[0, 0] = (255, 0, 0)
        return {
            "agentview_image": image,
            "robot0_eye_in_hand_image": image // 2,
            "robot0_eef_pos": self.hand,
            "robot0_eef_quat": np.array([np.sqrt(0.75), 0.0, 0.0, -0.5]),  # 240 degrees around x
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
            "robot0_gripper_qvel": np.zeros(2),
            "robot0_joint_pos": np.zeros(7),
            "robot0_joint_vel": np.zeros(7),
        }

    def close(self) -> None:
        self.closed = True
