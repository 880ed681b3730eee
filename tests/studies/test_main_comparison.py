"""Every row is a recipe that fits the policy, and the page keeps measured and published apart."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler  # what carries a cell to a worker process
from pathlib import Path
from typing import Any

import pytest

from omega_qvla import api
from omega_qvla.policies import open_policy
from omega_qvla.policies.pi05 import PI05
from omega_qvla.quantization import build_plan
from omega_qvla.spec import RecipeError, read_recipe
from omega_qvla.studies.main_comparison import (
    OWN,
    ROWS,
    STUDY,
    WIDTHS,
    WITHOUT_HEAD_ATTENTION,
    Row,
    at_width,
    recipe_of,
)
from omega_qvla.studies.study import Cell, Options


@pytest.fixture(scope="module")
def policy() -> PI05:
    return open_policy(api.bundled_checkpoint())


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    sources = dict.fromkeys(("policy", "twin"), api.bundled_checkpoint())
    return STUDY.cells(Options(tmp_path, sources, ("reach-v3", "push-v3"), episodes=2))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_rows_quantize_their_layers_at_their_width(row: Row, policy: PI05) -> None:
    plan = build_plan(recipe_of(row), policy)
    quantized = {linear.name for linear in plan.linears if linear.site is not None}
    parts = ("vision", "language") if row.layers == OWN else ("language", "action")
    wanted = {
        linear
        for site in policy.sites()
        for linear in site.linears
        if site.part in parts
        and not (row.layers == WITHOUT_HEAD_ATTENTION and site.part == "action" and "self_attn" in linear)
    }
    assert quantized == wanted
    for site in plan.sites:
        spec = plan.spec(site)
        weight = spec.weight.bits if spec.weight.allocation is None else spec.weight.allocation.average_bits
        assert f"W{weight:.0f}A{spec.activation.bits}" == row.width


def test_rows_are_distinct_and_at_widths_that_are_plotted() -> None:
    assert len({row.key for row in ROWS}) == len(ROWS)
    assert {row.width for row in ROWS} == set(WIDTHS)


@pytest.mark.parametrize("width", ["", "W4", "4A4", "W4A4x"])
def test_what_is_no_width_is_refused(width: str) -> None:
    with pytest.raises(ValueError, match="is no width"):
        at_width(read_recipe("rtn"), width)


def test_bits_that_no_recipe_has_are_refused() -> None:
    with pytest.raises(RecipeError, match="bits"):
        at_width(read_recipe("rtn"), "W1A4")


def test_the_most_informative_cells_come_first(cells: list[Cell]) -> None:
    keys = [cell.key for cell in cells]
    assert len(keys) == 2 * (1 + len(ROWS)) and keys[:2] == ["policy-full-precision", "twin-full-precision"]
    w4a4 = ["w4a4" in key for key in keys[2:]]
    assert w4a4 == sorted(w4a4, reverse=True)


def test_cells_reach_worker_processes(cells: list[Cell]) -> None:
    for cell in cells:
        assert ForkingPickler.loads(ForkingPickler.dumps(cell.compute)).args == cell.compute.args  # type: ignore[attr-defined]


def fake_results(cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """What the cells would give if every other episode were solved."""
    return {
        cell.key: {
            "source": cell.what["source"],
            "label": cell.what["label"],
            "recipe": cell.what["recipe"],
            "execution": "float" if cell.what["recipe"] is None else "integer",
            "bytes": {"codes": None, "scales": None, "total": 1_000_000},
            "episodes": [[task, seed, bool(seed % 2), 70] for task, seed in cell.what["episodes"]],
        }
        | ({} if cell.what["recipe"] is None else {"action_nmse": 0.0123})
        for cell in cells
    }


def pages(out: Path, results: Mapping[str, dict[str, Any]]) -> tuple[str, str]:
    """The measured and the published half of the rendered page."""
    STUDY.render(results, out)
    measured, published = (out / "main-comparison.md").read_text().split("## Published")
    return measured, published


def test_every_row_is_in_the_table_of_each_source(cells: list[Cell], tmp_path: Path) -> None:
    measured, _ = pages(tmp_path, fake_results(cells))
    for source in ("policy", "twin"):
        section = re.split(r"## Measured: ", measured)[1 + ("policy", "twin").index(source)]
        lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
        assert len(lines) == 1 + len(ROWS)
        for line, row in zip(lines[1:], ROWS, strict=True):
            assert line.startswith(f"| {row.recipe} {row.width} | {row.layers} | integer | 50.0 % (2/4)")
    with (tmp_path / "main-comparison.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(cells)
    assert (tmp_path / "main-comparison.svg").stat().st_size > 0


def test_published_figures_stay_out_of_the_measured_tables(cells: list[Cell], tmp_path: Path) -> None:
    measured, published = pages(tmp_path, fake_results(cells))
    assert "98.0" not in measured and "Ω-QVLA" not in measured
    assert "| Ω-QVLA | W4A4 | all | 87.8 | 98.0 |" in published and "2/4" not in published


@pytest.mark.parametrize("missing", ["policy-full-precision", "policy-rtn-w4a4", "twin-"])
def test_a_part_of_the_cells_is_rendered(missing: str, cells: list[Cell], tmp_path: Path) -> None:
    results = {key: result for key, result in fake_results(cells).items() if not key.startswith(missing)}
    measured, _ = pages(tmp_path, results)
    assert ("## Measured: twin" in measured) == (missing != "twin-")
    policy = measured.split("## Measured: policy")[1].split("## Measured: twin")[0]
    assert ("| rtn W4A4 |" in policy) == (missing != "policy-rtn-w4a4")
    assert ("0 variants were tested" in policy) == (missing == "policy-full-precision")


def test_full_precision_alone_is_rendered(cells: list[Cell], tmp_path: Path) -> None:
    measured, _ = pages(tmp_path, fake_results(cells[:1]))
    assert "| full precision | none | float | 50.0 % (2/4)" in measured
