"""A checkpoint that was once written stays readable and keeps its meaning."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from omega_qvla import api
from omega_qvla.pack.inspect import inspect

HERE = Path(__file__).parent
CHECKPOINT = HERE / "omega-int4"


def maker() -> ModuleType:
    specification = importlib.util.spec_from_file_location("golden_make", HERE / "make.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("execution", ["integer", "simulated"])
def test_it_acts_as_it_did(execution: Any) -> None:
    make = maker()
    policy = api.load(CHECKPOINT, execution)
    actions = policy.infer(make.ramp_observation(), make.ramp_noise())
    expected = np.array(json.loads((HERE / "expected.json").read_text())["actions"])
    assert np.abs(actions - expected).max() < 1e-5


def test_it_is_accounted_for() -> None:
    report = inspect(CHECKPOINT)
    assert (report.recipe, report.execution, report.quantized_linears) == ("omega-int4", "integer", 14)
    assert report.total_bytes < 300_000
