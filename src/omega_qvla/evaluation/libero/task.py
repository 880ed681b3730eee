"""One LIBERO task as a policy meets it: lerobot's environment under a profile."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from omega_qvla.evaluation.libero.installation import prepare_import
from omega_qvla.evaluation.libero.profile import Profile

os.environ.setdefault("MUJOCO_GL", "egl")  # read when the simulator is imported, which is now; it needs no display
prepare_import()

from lerobot.envs.libero import LiberoEnv  # noqa: E402

ACTION_DIM = 7
"""Displacement of the end effector (x, y, z), its rotation as axis times angle, and the gripper, in [-1, 1] each."""
CAMERAS = {
    "image": ("image", "base_0_rgb"),
    "image2": ("image2", "wrist_image", "left_wrist_0_rgb"),
}
"""lerobot's names of the two cameras, which look at the scene and from the wrist, and what checkpoints call them:
those of lerobot's, GR00T's and openpi's data. A policy takes the names that it knows."""


class LiberoTask:
    """A task of a suite; a seed is the number of one of its initial states."""

    def __init__(self, suite: Any, number: int, profile: Profile) -> None:
        """`suite` is LIBERO's own object, `number` that of a task in it."""
        self._profile = profile
        self._env = LiberoEnv(
            task_suite=suite,
            task_id=number,
            task_suite_name=suite.name,
            obs_type="pixels_agent_pos",
            observation_width=profile.camera_size,
            observation_height=profile.camera_size,
            num_steps_wait=profile.wait_steps,
        )
        self.instruction: str = self._env.task_description
        self._observation: dict[str, Any] = {}

    def reset(self, seed: int) -> None:
        """Start from initial state `seed`, and wait. Raises `ValueError` if the task has no such state."""
        states = len(self._env._init_states)
        if seed not in range(states):  # lerobot would begin again from the first, without a word
            raise ValueError(f"{self._env.task} has initial states 0 to {states - 1}, not {seed}")
        self._env.init_state_id = seed
        self._observation, _ = self._env.reset(seed=self._profile.seed(seed))

    def step(self, action: np.ndarray) -> bool:
        """Execute one action [7]; returns whether the task is solved. Raises `ValueError` for another width."""
        if action.shape != (ACTION_DIM,):
            raise ValueError(f"the policy's actions have {action.shape[-1]} dimensions, LIBERO's robot {ACTION_DIM}")
        self._observation, _, _, _, info = self._env.step(self._for_the_robot(action))
        return bool(info["is_success"])

    def proprioception(self) -> np.ndarray:
        """Position, orientation and fingers, float32 [8]; see `Profile.state`."""
        felt = self._observation["robot_state"]
        rotation = axis_angle(felt["eef"]["quat"])
        return np.concatenate([felt["eef"]["pos"], rotation, felt["gripper"]["qpos"]]).astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        """The two cameras under every name that policies have for them, uint8 [H, W, 3]."""
        seen = self._observation["pixels"]
        return {
            name: image
            for camera, names in CAMERAS.items()
            for image in [self._as_trained(seen[camera])]
            for name in names
        }

    def close(self) -> None:
        self._env.close()

    def _as_trained(self, image: np.ndarray) -> np.ndarray:
        turned = np.rot90(image, self._profile.image_rotation // 90)
        size = self._profile.image_size
        if size is None:
            return np.ascontiguousarray(turned)
        resized = Image.fromarray(np.ascontiguousarray(turned)).resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(resized)

    def _for_the_robot(self, action: np.ndarray) -> np.ndarray:
        if self._profile.gripper == "closed_is_plus_one":
            return action
        return np.append(action[:-1], np.sign(1 - 2 * action[-1]))


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """A unit quaternion (x, y, z, w) as axis times angle, float64 [3], angle from 0 to 2 π.

    Not the shorter of the two turns: policies were trained with robosuite's, which goes up to 2 π.
    """
    x, y, z, w = np.asarray(quaternion, np.float64)
    w = np.clip(w, -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0, rtol=1e-9, atol=0.0):
        return np.zeros(3)
    return np.array([x, y, z]) * (2.0 * np.arccos(w) / sine)
