"""Observations that fit a policy and mean nothing: for what takes as long whatever the robot sees."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from omega_qvla.policies.cameras import camera_of
from omega_qvla.policy import Observation

_LONGEST_SENTENCE = 6
_GROOT_IMAGE = (256, 256)
"""GR00T resizes whatever it gets."""


def random_observations(checkpoint: Path, count: int, seed: int = 0) -> Observation:
    """Noise that fits a policy: its cameras and state, and words that its tokenizer knows.

    Raises `ValueError` if the checkpoint has no tokenizer of its own, or one without a list of words.
    """
    generator = np.random.default_rng(seed)
    cameras, dimensions, place = _expected(checkpoint)
    images = {
        camera: generator.integers(0, 256, (count, *size, 3), dtype=np.uint8) for camera, size in cameras.items()
    }
    state = generator.uniform(-1, 1, (count, dimensions)).astype(np.float32)
    words = _words(checkpoint / place / "tokenizer.json")
    lengths = generator.integers(2, _LONGEST_SENTENCE, count, endpoint=True)
    return Observation(images, state, tuple(" ".join(generator.choice(words, length)) for length in lengths))


def _expected(checkpoint: Path) -> tuple[dict[str, tuple[int, int]], int, str]:
    """Height and width of each camera's images, the dimension of the state, and where the tokenizer lies."""
    config = json.loads((checkpoint / "config.json").read_text())
    if config.get("model_type") == "gr00t_n1_5":
        from omega_qvla.policies.groot_n15.processing import read_architecture, read_robot

        robot = read_robot(checkpoint, read_architecture(checkpoint))
        return dict.fromkeys(robot.cameras, _GROOT_IMAGE), robot.state_width, "eagle"
    cameras = {
        camera_of(key): (feature["shape"][1], feature["shape"][2])
        for key, feature in config["input_features"].items()
        if feature["type"] == "VISUAL" and ".empty_camera_" not in key
    }
    return cameras, config["input_features"]["observation.state"]["shape"][0], "tokenizer"


def _words(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; put the policy's tokenizer there, whose words make up instructions")
    vocabulary = json.loads(path.read_text())["model"].get("vocab")
    words = [word for word in vocabulary if re.fullmatch("[a-z]+", word)] if isinstance(vocabulary, dict) else []
    if not words:
        raise ValueError(f"{path}: model.vocab holds no words; use a tokenizer that maps words to numbers")
    return words
