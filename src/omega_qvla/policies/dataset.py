"""Calibration observations from a recorded lerobot dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from lerobot.datasets import LeRobotDataset

from omega_qvla.policy import Observation

_IMAGES = "observation.images."


def read_observations(root: Path, count: int) -> tuple[Observation, tuple[str, ...]]:
    """`count` frames, evenly spaced over a local dataset, and the episodes that they are from.

    Raises `FileNotFoundError` if `root` holds no lerobot dataset, `ValueError` if it has no state or cameras.
    """
    if not (root / "meta" / "info.json").is_file():
        raise FileNotFoundError(f"{root} holds no lerobot dataset: meta/info.json is missing")
    dataset = LeRobotDataset(repo_id=root.name, root=root)
    cameras = [key for key in dataset.features if key.startswith(_IMAGES)]
    if not cameras or "observation.state" not in dataset.features:
        raise ValueError(f"the dataset {root} lacks cameras or observation.state")
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int))
    frames = [dataset[int(index)] for index in chosen]
    images = {
        key.removeprefix(_IMAGES): np.stack(
            [(frame[key].permute(1, 2, 0) * 255).round().byte().numpy() for frame in frames]
        )
        for key in cameras
    }
    state = np.stack([frame["observation.state"].float().numpy() for frame in frames])
    episodes = sorted({int(frame["episode_index"]) for frame in frames})
    ids = tuple(f"{root.name}:episode {episode}" for episode in episodes)
    return Observation(images, state, tuple(frame["task"] for frame in frames)), ids
