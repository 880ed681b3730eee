"""Observations from a recorded lerobot dataset."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lerobot.datasets import LeRobotDataset

from omega_qvla.policies.cameras import features_of_cameras
from omega_qvla.policy import Observation


@dataclass(frozen=True)
class Frame:
    """One frame of a dataset, an observation that is a batch of one."""

    episode: int
    number: int
    """Of its episode."""
    observation: Observation


def read_observations(root: Path, count: int) -> tuple[Observation, tuple[str, ...]]:
    """`count` frames, evenly spaced over a local dataset, and the episodes that they are from.

    Raises `FileNotFoundError` if `root` holds no lerobot dataset, `ValueError` if it has no state or cameras.
    """
    dataset = _opened(root)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int))
    frames = [_frame(dataset, int(index)) for index in chosen]
    ids = tuple(episode_id(root, episode) for episode in sorted({frame.episode for frame in frames}))
    return Observation.concatenate([frame.observation for frame in frames]), ids


def read_consecutive(root: Path, count: int, every: int, without: Collection[str] = ()) -> list[Frame]:
    """At most `count` frames of a local dataset, as evenly spaced pairs that are `every` frames apart in an episode.

    Numbers are multiples of `every`: frames at which a policy that executes so many actions would be asked.
    `without`: ids of episodes that are left out, if others are left. Raises as `read_observations` does, and
    `ValueError` if no episode is longer than `every` frames.
    """
    dataset = _opened(root)
    columns = dataset.hf_dataset.select_columns(["episode_index", "frame_index"]).with_format("numpy")[:]
    places = list(zip(columns["episode_index"].tolist(), columns["frame_index"].tolist(), strict=True))
    index_of = {place: index for index, place in enumerate(places)}
    starts = [(e, n) for e, n in places if n % every == 0 and (e, n + every) in index_of]
    if not starts:
        raise ValueError(f"no episode of the dataset {root} is longer than {every} frames")
    starts = [(e, n) for e, n in starts if episode_id(root, e) not in without] or starts
    chosen = np.unique(np.linspace(0, len(starts) - 1, max(1, count // 2)).round().astype(int))
    wanted = {(e, n + ahead) for e, n in (starts[index] for index in chosen) for ahead in (0, every)}
    return [_frame(dataset, index_of[place]) for place in sorted(wanted)]


def episode_id(root: Path, episode: int) -> str:
    """How records of calibration call an episode of a dataset."""
    return f"{root.name}:episode {episode}"


def _opened(root: Path) -> LeRobotDataset:
    if not (root / "meta" / "info.json").is_file():
        raise FileNotFoundError(f"{root} holds no lerobot dataset: meta/info.json is missing")
    dataset = LeRobotDataset(repo_id=root.name, root=root)
    if not dataset.meta.camera_keys or "observation.state" not in dataset.features:
        raise ValueError(f"the dataset {root} lacks cameras or observation.state")
    return dataset


def _frame(dataset: LeRobotDataset, index: int) -> Frame:
    frame = dataset[index]
    images = {
        camera: (frame[feature].permute(1, 2, 0) * 255).round().byte().numpy()[None]
        for camera, feature in features_of_cameras(dataset.meta.camera_keys).items()
    }
    state = frame["observation.state"].float().numpy()[None]
    observation = Observation(images, state, (frame["task"],))
    return Frame(int(frame["episode_index"]), int(frame["frame_index"]), observation)
