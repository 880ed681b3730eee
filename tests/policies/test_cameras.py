"""Cameras go by the names that checkpoints, datasets and environments give them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies import open_policy
from omega_qvla.policies.cameras import camera_of, features_of_cameras, holds_images
from omega_qvla.policies.random_observations import random_observations
from omega_qvla.policy import Observation
from tiny_policy import CAMERAS, FAMILIES, save_family


def save_renamed(family: str, out: Path, names: dict[str, str]) -> Path:
    """A checkpoint in which features have other names, as if it had been trained on a dataset with those."""
    save_family(family, out)
    for path in out.glob("*.json"):
        text = path.read_text()
        for old, new in names.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        path.write_text(text)
    return out


def test_names() -> None:
    assert camera_of("observation.images.front") == "front" and camera_of("observation.image") == "image"
    assert holds_images("observation.image") and holds_images("observation.images.front")
    assert not holds_images("observation.state") and not holds_images("observation.images_are_pixels")
    features = ["observation.images.front", "observation.image"]
    assert features_of_cameras(features) == {"front": features[0], "image": features[1]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_only_camera_of_an_environment(
    family: str, observations: Observation, noise: Tensor, tmp_path: Path
) -> None:
    save_family(family, tmp_path / "usual")
    expected = open_policy(tmp_path / "usual").infer(observations, noise)
    directory = save_renamed(family, tmp_path / "renamed", {"observation.images.back": "observation.image"})
    policy = open_policy(directory)
    assert list(policy.interface().cameras) == ["image", "front"]
    back, front = (observations.images[camera] for camera in CAMERAS)
    renamed = Observation({"image": back, "front": front}, observations.state, observations.instructions)
    assert np.array_equal(policy.infer(renamed, noise), expected)
    assert list(random_observations(directory, 1).images) == ["image", "front"]


def test_two_features_of_one_camera_are_refused(tmp_path: Path) -> None:
    names = {"observation.images.back": "observation.image", "observation.images.front": "observation.images.image"}
    directory = save_renamed("pi05", tmp_path / "policy", names)
    with pytest.raises(CheckpointError, match="both name the camera 'image'; rename one of them"):
        open_policy(directory)
