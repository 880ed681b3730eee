"""Traces along full precision's episodes."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omega_qvla.studies import traces
from omega_qvla.studies.study import Options, Result
from omega_qvla.studies.traces import DIMENSIONS, FULL_PRECISION, QUANTIZED, STUDY, deviation
from omega_qvla.studies.workbench import Workbench, answers


@pytest.fixture(scope="module")
def results(computed: Callable[..., dict[str, Result]], bench: Workbench) -> dict[str, Result]:
    """On two short episodes instead of the simulator's."""
    tasks = ("reach-v3", "push-v3")
    recorded = [replace(record, task=tasks[i % 2], inference=i // 2) for i, record in enumerate(bench.held_out)]
    return computed(traces, _episodes=lambda checkpoint, tasks: recorded)


def test_traces_are_first_actions_in_order(results: dict[str, Result], bench: Workbench) -> None:
    full = results[f"policy-{FULL_PRECISION}"]
    assert list(full["traces"]) == ["reach-v3", "push-v3"]
    recorded = [replace(record, task="reach-v3", inference=i) for i, record in enumerate(bench.held_out[::2])]
    wanted = answers(bench.policy, recorded)[:, 0]
    np.testing.assert_allclose(full["traces"]["reach-v3"], wanted, atol=1e-4)


def test_only_quantized_policies_deviate(results: dict[str, Result]) -> None:
    found = {variant: results[f"policy-{variant}"] for variant in (FULL_PRECISION, *QUANTIZED)}
    assert not deviation(found, FULL_PRECISION, "push-v3").any()
    for variant in QUANTIZED:
        error = deviation(found, variant, "push-v3")
        assert error.shape == (6, len(DIMENSIONS)) and np.abs(error).max() > 0


def test_tasks_are_the_three_or_the_first_that_are_asked_for(options: Options) -> None:
    assert STUDY.cells(options)[0].what["tasks"] == ("reach-v3", "push-v3")
    more = replace(options, tasks=("reach-v3", "peg-insert-side-v3", "drawer-open-v3"))
    assert STUDY.cells(more)[0].what["tasks"] == ("drawer-open-v3", "peg-insert-side-v3")


def test_rendering(results: dict[str, Result], tmp_path: Path) -> None:
    STUDY.render(results, tmp_path)
    assert {path.name for path in tmp_path.glob("*.svg")} == {"traces-policy.svg", "traces-twin.svg"}
    with (tmp_path / "traces.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12 * len(results)
    assert "Root mean square deviation" in (tmp_path / "traces.md").read_text()


def test_deviations_need_full_precision(results: dict[str, Result], tmp_path: Path) -> None:
    STUDY.render({"policy-rtn": results["policy-rtn"]}, tmp_path)
    assert "deviation" not in (tmp_path / "traces.md").read_text()
