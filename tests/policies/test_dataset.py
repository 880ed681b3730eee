"""Calibration observations from a lerobot dataset that is written here with lerobot itself."""

from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset

from omega_qvla.policies.dataset import read_consecutive, read_observations

SIDE, LENGTH = 16, 6
INSTRUCTIONS = ("reach a goal", "open the door")


def image(episode: int, frame: int, camera: str) -> np.ndarray:
    """A picture that says where it is from."""
    return np.full((SIDE, SIDE, 3), [episode * 100, frame * 20, 200 * (camera == "front")], dtype=np.uint8)


def write_dataset(root: Path, *, cameras: tuple[str, ...] = ("back", "front"), state: bool = True) -> Path:
    shape = {"shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
    features: dict = {f"observation.images.{camera}": {"dtype": "image"} | shape for camera in cameras}
    features["action"] = {"dtype": "float32", "shape": (2,), "names": None}
    if state:
        features["observation.state"] = {"dtype": "float32", "shape": (3,), "names": None}
    dataset = LeRobotDataset.create("tests/tiny", fps=10, features=features, root=root, use_videos=False)
    for episode, instruction in enumerate(INSTRUCTIONS):
        for frame in range(LENGTH):
            values: dict = {f"observation.images.{name}": image(episode, frame, name) for name in cameras}
            values |= {"action": np.zeros(2, dtype=np.float32), "task": instruction}
            if state:
                values["observation.state"] = np.array([episode, frame, 0.5], dtype=np.float32)
            dataset.add_frame(values)
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("datasets") / "tiny")


def test_all_frames_as_they_were_recorded(dataset: Path) -> None:
    observations, episodes = read_observations(dataset, 1000)
    assert len(observations) == 2 * LENGTH
    assert episodes == ("tiny:episode 0", "tiny:episode 1")
    for index in range(2 * LENGTH):
        episode, frame = divmod(index, LENGTH)
        assert observations.instructions[index] == INSTRUCTIONS[episode]
        assert observations.state[index].tolist() == [episode, frame, 0.5]
        for camera in ("back", "front"):
            assert np.array_equal(observations.images[camera][index], image(episode, frame, camera))
    assert observations.images["back"].dtype == np.uint8 and observations.state.dtype == np.float32


def test_fewer_frames_are_evenly_spaced(dataset: Path) -> None:
    observations, _ = read_observations(dataset, 3)
    assert [tuple(row[:2]) for row in observations.state.tolist()] in (
        [(0, 0), (0, 5), (1, 5)],
        [(0, 0), (1, 0), (1, 5)],
    )


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no lerobot dataset: meta/info\.json is missing"):
        read_observations(tmp_path, 4)


@pytest.mark.parametrize("missing", ["cameras", "state"])
def test_a_dataset_without_cameras_or_state(missing: str, tmp_path: Path) -> None:
    cameras = () if missing == "cameras" else ("back",)
    root = write_dataset(tmp_path / "blind", cameras=cameras, state=missing != "state")
    with pytest.raises(ValueError, match=r"blind lacks cameras or observation\.state"):
        read_observations(root, 4)


def test_frames_that_a_policy_would_be_asked_at(dataset: Path) -> None:
    frames = read_consecutive(dataset, 1000, 2)
    assert [(frame.episode, frame.number) for frame in frames] == [(e, n) for e in (0, 1) for n in (0, 2, 4)]
    for frame in frames:
        assert frame.observation.state[0].tolist() == [frame.episode, frame.number, 0.5]
        assert frame.observation.instructions == (INSTRUCTIONS[frame.episode],)
        assert np.array_equal(frame.observation.images["front"][0], image(frame.episode, frame.number, "front"))
    assert {frame.episode for frame in read_consecutive(dataset, 4, 2, ("tiny:episode 0",))} == {1}


def test_no_episode_is_long_enough(dataset: Path) -> None:
    with pytest.raises(ValueError, match=f"longer than {LENGTH} frames"):
        read_consecutive(dataset, 4, LENGTH)
