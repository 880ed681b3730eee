"""A task of Meta-World's MT10 as a robot sees it: two cameras, proprioception and a sentence.

The simulator is the published package; ours are only the two viewpoints and a renderer that is fast
without a GPU. Meta-World draws the goal as a site: in reach, push and pick-place that marker is the only
sign of the goal, in the other tasks it is a hint that a real robot would not have. It stays visible in all.

Initial states are named by an integer seed: the same seed gives the same scene on every machine.
"""

from __future__ import annotations

import ctypes.util
import os
import warnings
from dataclasses import dataclass

import numpy as np

if "MUJOCO_GL" not in os.environ:
    # MuJoCo reads its backend from the environment when it is imported; software Mesa needs no GPU.
    os.environ["MUJOCO_GL"] = "osmesa" if ctypes.util.find_library("OSMesa") else "egl"

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mujoco
        from metaworld.env_dict import MT10_V3
        from metaworld.policies import ENV_POLICY_MAP
except ImportError as error:
    raise ImportError(
        "Meta-World needs `pip install 'omega-qvla[metaworld]'` and an OpenGL library for rendering "
        f"(Debian: `apt-get install libosmesa6`); {error}"
    ) from error

IMAGE_SIZE = 96
"""Side of the square camera images, in pixels."""

TASKS: dict[str, str] = {
    "reach-v3": "Reach a goal position",
    "push-v3": "Push the puck to a goal",
    "pick-place-v3": "Pick and place a puck to a goal",
    "door-open-v3": "Open a door with a revolving joint",
    "drawer-open-v3": "Open a drawer",
    "drawer-close-v3": "Push and close a drawer",
    "button-press-topdown-v3": "Press a button from the top",
    "peg-insert-side-v3": "Insert a peg sideways",
    "window-open-v3": "Push and open a window",
    "window-close-v3": "Push and close a window",
}
"""MT10's tasks and their instructions, the sentences that lerobot gives for them."""

ACTION_DIM = 4
"""Hand displacement (x, y, z) and gripper effort, each in [-1, 1]."""


@dataclass(frozen=True)
class Camera:
    """A viewpoint: `position` and `target` in metres in the world frame, vertical view angle in degrees."""

    model_camera: str
    position: tuple[float, float, float]
    target: tuple[float, float, float]
    field_of_view: float

    def rotation(self) -> np.ndarray:
        """Columns are the camera's x, y and z axes in the world frame, [3, 3]; it looks along -z."""
        backward = np.subtract(self.position, self.target)
        backward /= np.linalg.norm(backward)
        right = np.cross([0.0, 0.0, 1.0], backward)
        right /= np.linalg.norm(right)
        return np.stack([right, np.cross(backward, right), backward], axis=1)

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points [..., 3] to image coordinates [..., 2] (column, row), 0..1 inside the image."""
        local = (points - np.asarray(self.position)) @ self.rotation()
        scale = 0.5 / np.tan(np.radians(self.field_of_view) / 2)
        depth = -local[..., 2]
        return np.stack([0.5 + scale * local[..., 0] / depth, 0.5 - scale * local[..., 1] / depth], axis=-1)


# The two lines of sight are nearly perpendicular, so that together they fix the depth of a floating goal.
CAMERAS: dict[str, Camera] = {
    "back": Camera("corner2", (0.75, 0.075, 0.70), (-0.02, 0.74, 0.10), 38.0),
    "front": Camera("corner3", (0.60, 1.35, 0.65), (0.0, 0.70, 0.10), 38.0),
}


class MetaWorldTask:
    """One MT10 task with our two cameras.

    `images` and `proprioception` are what a policy may see. `privileged` is Meta-World's full state
    vector [39], with object and goal positions, for scripted experts and training labels only.
    """

    def __init__(self, name: str) -> None:
        """Raises `ValueError` for a task that is not in MT10."""
        if name not in MT10_V3:
            raise ValueError(f"unknown Meta-World task {name!r}; MT10 has {', '.join(TASKS)}")
        self.name = name
        self.instruction = TASKS[name]
        self._env = MT10_V3[name]()
        self._env._freeze_rand_vec = False
        self._env._set_task_called = True
        self._env.seeded_rand_vec = True  # without it `seed` does not reach the initial state
        self._env._partially_observable = False
        self._env.__dict__.pop("sawyer_observation_space", None)  # cached with the goal clipped to zero
        model = self._env.model
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        for camera in CAMERAS.values():
            index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera.model_camera)
            quaternion = np.empty(4)
            mujoco.mju_mat2Quat(quaternion, camera.rotation().flatten())
            model.cam_pos[index], model.cam_quat[index] = camera.position, quaternion
            model.cam_fovy[index] = camera.field_of_view
        self._renderer: mujoco.Renderer | None = None
        self.privileged = np.zeros(39, np.float32)

    def reset(self, seed: int) -> None:
        """Start the episode whose initial state is named by `seed`."""
        self._env.seed(seed)
        state, _ = self._env.reset()
        mujoco.mj_forward(self._env.model, self._env.data)
        self.privileged = state.astype(np.float32)

    def step(self, action: np.ndarray) -> bool:
        """Execute one action [4], clipped to [-1, 1]; returns whether the task is solved."""
        state, _, _, _, info = self._env.step(np.clip(action, -1, 1).astype(np.float32))
        self.privileged = state.astype(np.float32)
        return info["success"] > 0

    def proprioception(self) -> np.ndarray:
        """Hand position in metres and gripper opening in [0, 1], float32 [4]."""
        return self.privileged[:4]

    def images(self) -> dict[str, np.ndarray]:
        """One uint8 image [IMAGE_SIZE, IMAGE_SIZE, 3] per camera."""
        return {name: self.render(camera.model_camera) for name, camera in CAMERAS.items()}

    def render(self, model_camera: str) -> np.ndarray:
        """One uint8 image [IMAGE_SIZE, IMAGE_SIZE, 3] from a camera of the simulator's model."""
        if self._renderer is None:
            self._renderer = mujoco.Renderer(self._env.model, IMAGE_SIZE, IMAGE_SIZE)
        self._renderer.update_scene(self._env.data, camera=model_camera)
        flags = self._renderer._scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return self._renderer.render().copy()

    def expert(self) -> object:
        """Meta-World's scripted expert for this task; `get_action(privileged)` gives an action [4]."""
        return ENV_POLICY_MAP[self.name]()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self._env.close()
