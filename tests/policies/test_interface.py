"""What a policy says it takes is what it takes, and what it says it gives is what it gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla.policies import open_policy
from omega_qvla.policy import Observation
from tiny_policy import CAMERAS, FAMILIES, STATE_DIM, save_family


@pytest.mark.parametrize("family", FAMILIES)
def test_an_observation_as_declared_is_answered_as_declared(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path / family)
    policy = open_policy(tmp_path / family)
    interface = policy.interface()
    assert tuple(interface.cameras) == CAMERAS and interface.state_width == STATE_DIM
    images = {}
    for name, size in interface.cameras.items():
        assert size is not None
        images[name] = np.zeros((1, *size, 3), np.uint8)
    observation = Observation(images, np.zeros((1, interface.state_width), np.float32), ("open the door",))
    actions = policy.infer(observation, torch.zeros(1, *policy.noise_shape))
    assert actions.shape == (1, policy.noise_shape[0], interface.action_width)
