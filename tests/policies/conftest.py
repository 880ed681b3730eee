"""A tiny checkpoint of every family, and what is quantized from it, each made once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from omega_qvla import api
from omega_qvla.policies import open_policy
from omega_qvla.policies.lerobot_policy import LerobotPolicy
from omega_qvla.policy import Observation
from omega_qvla.spec import Recipe, read_recipe
from tiny_policy import save_family
from toy_policy import recipe

KEEP_ALL = recipe(*({"part": part, "keep": "to compare"} for part in ("vision", "language", "action")))
RECIPES: dict[str, Recipe] = {"kept": KEEP_ALL} | {
    name: read_recipe(name) for name in ("rtn", "omega-int4", "omega-qvla")
}
"""What the families are quantized with; `kept` leaves everything in floating point."""

OTHER_PROCESS = """
import sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from omega_qvla import load
from omega_qvla.policy import Observation
file, *directories = sys.argv[1:]
data = np.load(file)
images = {name: data[name] for name in ("back", "front")}
observation = Observation(images, data["state"], tuple(data["instructions"].tolist()))
actions = [load(Path(d)).infer(observation, torch.from_numpy(data["noise"])) for d in directories]
np.save(file + ".actions.npy", np.stack(actions))
"""


@pytest.fixture(scope="session")
def infer_elsewhere(
    observations: Observation, noise: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[Path]], list[np.ndarray]]:
    """Actions of policies as a new process loads and computes them."""

    def infer(directories: list[Path]) -> list[np.ndarray]:
        file = tmp_path_factory.mktemp("elsewhere") / "data.npz"
        data: dict[str, Any] = {"state": observations.state, "noise": noise.numpy(), **observations.images}
        np.savez(file, instructions=np.array(observations.instructions), **data)
        arguments = [sys.executable, "-c", OTHER_PROCESS, str(file), *map(str, directories)]
        subprocess.run(arguments, check=True, cwd=file.parent)
        return list(np.load(f"{file}.actions.npy"))

    return infer


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The floating-point checkpoint of a family; read-only."""

    @cache
    def make(family: str) -> Path:
        directory = tmp_path_factory.mktemp("source") / family
        save_family(family, directory)
        return directory

    return make


@pytest.fixture(scope="session")
def opened(source: Callable[[str], Path]) -> Callable[[str], LerobotPolicy]:
    """The floating-point policy of a family; to be left as it is."""
    return cache(lambda family: open_policy(source(family)))


@pytest.fixture(scope="session")
def packed(
    source: Callable[[str], Path], calibration: api.CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """The quantized checkpoint of a family and one of RECIPES; read-only."""

    @cache
    def make(family: str, name: str) -> Path:
        out = tmp_path_factory.mktemp("packed") / f"{family}-{name}"
        api.quantize(source(family), RECIPES[name], out, calibration=None if name == "kept" else calibration)
        return out

    return make
