"""The tiny policy as a bench, on which the cells of studies are computed without a simulator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omega_qvla.evaluation.recording import RecordedObservation
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import Observation
from omega_qvla.studies.study import Options, Result
from omega_qvla.studies.workbench import Workbench
from tiny_policy import random_observations

HELD_OUT = 12

Compute = Callable[..., dict[str, Result]]


@pytest.fixture(scope="session")
def bench(floating: PI05, observations: Observation) -> Workbench:
    held_out = random_observations(HELD_OUT, seed=3)
    records = [RecordedObservation("reach-v3", 7, i, held_out[i : i + 1]) for i in range(HELD_OUT)]
    return Workbench(floating, observations, tuple(records))


@pytest.fixture
def options(checkpoint: Path, tmp_path: Path) -> Options:
    return Options(tmp_path, {"policy": checkpoint, "twin": checkpoint}, ("reach-v3", "push-v3"))


@pytest.fixture(scope="session")
def computed(bench: Workbench, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Compute:
    """Computes a study's cells on the tiny policy, some names of its module replaced; as results are read from their
    files, and the same again as those of a twin."""
    options = Options(tmp_path_factory.mktemp("studies"), {"policy": checkpoint}, ("reach-v3", "push-v3"))

    def compute(module: Any, **replaced: Any) -> dict[str, Result]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "open_workbench", lambda checkpoint: bench)
            for name, value in replaced.items():
                patch.setattr(module, name, value)
            cells = module.STUDY.cells(options)
            results = {cell.key: json.loads(json.dumps(cell.compute(), allow_nan=False)) for cell in cells}
        twin = {key.replace("policy", "twin"): result | {"source": "twin"} for key, result in results.items()}
        return results | twin

    return compute
