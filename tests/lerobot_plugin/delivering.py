"""Observations as lerobot's environments deliver them."""

from __future__ import annotations

from typing import Any

import torch

from omega_qvla.policy import Observation


def delivered(observation: Observation) -> dict[str, Any]:
    """The batch of what lerobot's environments saw."""
    images = {
        f"observation.images.{camera}": torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
        for camera, image in observation.images.items()
    }
    return images | {
        "observation.state": torch.from_numpy(observation.state),
        "task": list(observation.instructions),
    }
