"""A robot for lerobot's programs that consists of numbers: its joints are where they were last sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

from tiny_policy import ACTION_DIM, CAMERAS

JOINTS = tuple(f"joint_{i}.pos" for i in range(ACTION_DIM))
IMAGE = (96, 96, 3)


@RobotConfig.register_subclass("stand_in")
@dataclass
class StandInRobotConfig(RobotConfig):
    """lerobot finds the robot by this name without `Config`."""


class StandInRobot(Robot):
    config_class = StandInRobotConfig
    name = "stand_in"

    def __init__(self, config: StandInRobotConfig) -> None:
        super().__init__(config)
        self.at = dict.fromkeys(JOINTS, 0.0)
        self.sent: list[list[float]] = []
        self.connected = False

    @property
    def observation_features(self) -> dict[str, Any]:
        return {**self.action_features, **dict.fromkeys(CAMERAS, IMAGE)}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(JOINTS, float)

    @property
    def is_connected(self) -> bool:
        return self.connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        self.connected = True

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        return {**self.at, **{camera: np.full(IMAGE, 100, np.uint8) for camera in CAMERAS}}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.at = {joint: float(np.clip(action[joint], -1, 1)) for joint in JOINTS}
        self.sent.append([float(action[joint]) for joint in JOINTS])
        return action

    def disconnect(self) -> None:
        self.connected = False
