"""One tiny policy for all rooms, and its quantized checkpoints, each made once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# One thread, here and in child processes: the models are tiny, and sums depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

from omega_qvla import api, cli
from omega_qvla.policies import open_policy
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import Observation
from omega_qvla.spec import Recipe, read_recipe, with_settings
from tiny_policy import Size, initialize, random_noise, random_observations, save

torch.set_num_threads(1)


def quick(name: str) -> Recipe:
    """A bundled recipe; of one that measures channels one by one, with few of them."""
    settings = ["weight.allocation.remeasured=2", "weight.allocation.observations=4"] if name == "qvla" else []
    return with_settings(read_recipe(name), settings, name=name)


@pytest.fixture(scope="session")
def observations() -> Observation:
    return random_observations(8, seed=1)


@pytest.fixture(scope="session")
def noise() -> torch.Tensor:
    return random_noise(8, seed=2)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A floating-point lerobot checkpoint."""
    directory = tmp_path_factory.mktemp("source") / "tiny"
    save(initialize(Size(), seed=0), Size(), directory)
    return directory


@pytest.fixture(scope="session")
def floating(checkpoint: Path) -> PI05:
    return open_policy(checkpoint)


@pytest.fixture(scope="session")
def calibration(observations: Observation) -> api.CalibrationSet:
    return api.CalibrationSet(observations, ("random:1",))


@pytest.fixture(scope="session")
def quantized(
    checkpoint: Path, calibration: api.CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The quantized checkpoint of a bundled recipe; read-only."""

    @cache
    def make(recipe: str) -> Path:
        out = tmp_path_factory.mktemp("quantized") / recipe
        api.quantize(checkpoint, quick(recipe), out, calibration=calibration)
        return out

    return make


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The installed command in this process: exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["omega-qvla", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code: Any = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capfd.readouterr()

    return run
