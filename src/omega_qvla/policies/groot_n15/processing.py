"""From an observation to the inputs of a GR00T N1.5, and from its actions back to physical units."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from omega_qvla.policies.groot_n15 import lerobot_layout, nvidia_layout
from omega_qvla.policies.groot_n15.architecture import CONFIG_FILE, Architecture
from omega_qvla.policies.groot_n15.model import Inputs
from omega_qvla.policies.groot_n15.prompt import Prompts
from omega_qvla.policies.groot_n15.robot import Robot
from omega_qvla.policies.stored import read_json_object
from omega_qvla.policy import Observation


def read_architecture(directory: Path) -> Architecture:
    """The sizes of the checkpoint in `directory`, of whichever layout. Raises `CheckpointError`."""
    return lerobot_layout.read_architecture(directory) if _is_lerobots(directory) else Architecture.read(directory)


def read_robot(directory: Path, architecture: Architecture) -> Robot:
    """The robot of the checkpoint in `directory`, of whichever layout. Raises `CheckpointError`."""
    layout = lerobot_layout if _is_lerobots(directory) else nvidia_layout
    return layout.read_robot(directory, architecture.action_head)


class Processing:
    """What stands between a robot and the model."""

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        """Raises `CheckpointError` if the checkpoint lacks what it needs."""
        self.robot = read_robot(directory, architecture)
        self._prompts = Prompts(directory, architecture.eagle, len(self.robot.cameras))
        self._image_size = architecture.eagle.vision_config.image_size
        self._state_width = architecture.action_head.max_state_dim

    def inputs(self, observation: Observation) -> Inputs:
        """Raises `ValueError` if a camera is missing or the state is not as wide as the robot's."""
        tokens, mask = self._prompts(observation.instructions)
        embodiment = torch.full((len(observation),), self.robot.embodiment)
        return Inputs(self._pixels(observation), tokens, mask, self._state(observation), embodiment)

    def physical(self, actions: Tensor) -> Tensor:
        """Actions [B, chunk, action width] in physical units of normalized ones."""
        parts = self.robot.actions.values()
        split = actions.split([part.width for part in parts], dim=-1)
        return torch.cat([part.physical(values) for part, values in zip(parts, split, strict=True)], dim=-1)

    def _pixels(self, observation: Observation) -> Tensor:
        """float32 [B · cameras, 3, size, size] between -1 and 1, all images of the first observation first."""
        cameras = self.robot.cameras
        if missing := [camera for camera in cameras if camera not in observation.images]:
            raise ValueError(f"camera {missing[0]!r} is missing; the policy was trained with {', '.join(cameras)}")
        resized = [self._resized(observation.images[camera]) for camera in cameras]
        return torch.stack(resized, dim=1).flatten(0, 1) / 127.5 - 1

    def _resized(self, images: np.ndarray) -> Tensor:
        """Whole numbers from 0 to 255, float32 [B, 3, size, size], of uint8 [B, H, W, 3]."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        size, crop = (self._image_size, self._image_size), self.robot.crop
        if crop is None:  # Eagle's image processor, which rounds to 8 bits between rows and columns too
            return F.interpolate(pixels, size, mode="bicubic", antialias=True).float()
        pixels = _centre(pixels, crop).float() / 255  # NVIDIA's transforms, which go through 0..1 and round down
        return (F.interpolate(pixels, size, mode="bilinear", antialias=True) * 255).floor().clamp(0, 255)

    def _state(self, observation: Observation) -> Tensor:
        """Normalized and padded, float32 [B, 1, state width of the model]."""
        state, robot = torch.from_numpy(observation.state), self.robot
        if state.shape[-1] != robot.state_width:
            raise ValueError(f"the state has {state.shape[-1]} channels instead of {robot.state_width}")
        split = state.split([part.width for part in robot.state.values()], dim=-1)
        parts = [part.normalize(values) for part, values in zip(robot.state.values(), split, strict=True)]
        normalized = torch.cat(parts, dim=-1)
        return F.pad(normalized, (0, self._state_width - normalized.shape[-1]))[:, None]


def _is_lerobots(directory: Path) -> bool:
    path = directory / CONFIG_FILE
    return path.is_file() and read_json_object(path).get("type") == lerobot_layout.TYPE


def _centre(images: Tensor, share: float) -> Tensor:
    height, width = (int(extent * share) for extent in images.shape[-2:])
    # Python's `round`, as torchvision's centre crop has it.
    top, left = round((images.shape[-2] - height) / 2), round((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]
