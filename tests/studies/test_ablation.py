"""The variants are those of Table 4 and one-line changes, and all of them fit the policy."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from omega_qvla import api
from omega_qvla.policies import open_policy
from omega_qvla.policies.pi05 import PI05
from omega_qvla.quantization import build_plan
from omega_qvla.spec import read_recipe
from omega_qvla.studies.ablation import CHANGES, COMBINATIONS, STUDY, VARIANTS, Change
from omega_qvla.studies.study import Cell, Options


@pytest.fixture(scope="module")
def policy() -> PI05:
    return open_policy(api.bundled_checkpoint())


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    sources = dict.fromkeys(("policy", "twin"), api.bundled_checkpoint())
    return STUDY.cells(Options(tmp_path, sources, ("reach-v3", "push-v3"), episodes=2))


@pytest.mark.parametrize("change", VARIANTS, ids=lambda change: change.key)
def test_variants_fit_the_policy(change: Change, policy: PI05) -> None:
    recipe = change.variant(0).recipe
    assert recipe is not None and recipe.name == change.label
    plan = build_plan(recipe, policy)
    assert {plan.spec(site).weight.bits for site in plan.sites} == {4}


def test_every_variant_is_another_recipe() -> None:
    recipes = [change.variant(0).recipe for change in VARIANTS]
    rules = [recipe.rules for recipe in recipes if recipe is not None]
    assert all(rules.count(one) == 1 for one in rules)


def test_combinations_hold_the_method_itself_once() -> None:
    assert len(COMBINATIONS) == 16
    same = [
        change.label
        for change in COMBINATIONS.values()
        if (recipe := change.variant(0).recipe) is not None and recipe.rules == read_recipe("omega-qvla").rules
    ]
    assert same == ["SVD·H + PS, RTN head"]


def test_episodes_are_run_where_table_4_has_them(cells: list[Cell]) -> None:
    ran = [cell.what["label"] for cell in cells if cell.what["episodes"] and cell.what["source"] == "policy"]
    table_4 = {"SVD + PS, RTN head", "SVD·H − PS, RTN head", "SVD·H + PS, RTN head"}
    assert ran[0] == "full precision" and set(ran[1:]) == table_4
    assert [cell.what["label"] for cell in cells[::2][:4]] == ran
    assert all(cell.what["layers"] for cell in cells if cell.what["recipe"] is not None)


def fake_results(cells: list[Cell]) -> dict[str, dict[str, Any]]:
    measured = {"action_nmse": 0.0123, "layer_nmse": {"language q_proj": 0.1, "action q_proj": 0.2}}
    return {
        cell.key: {
            "source": cell.what["source"],
            "label": cell.what["label"],
            "recipe": cell.what["recipe"],
            "execution": "float" if cell.what["recipe"] is None else "integer",
            "bytes": {"codes": None, "scales": None, "total": 1_000_000},
            "episodes": [[task, seed, bool(seed % 2), 70] for task, seed in cell.what["episodes"]],
        }
        | ({} if cell.what["recipe"] is None else measured)
        for cell in cells
    }


def test_the_page_shows_closed_loop_actions_and_layers(cells: list[Cell], tmp_path: Path) -> None:
    STUDY.render(fake_results(cells), tmp_path)
    page, published = (tmp_path / "ablation.md").read_text().split("## Published")
    closed, rest = page.split("## Measured: action error")
    actions, *layers = rest.split("## Measured: output error of layers")
    assert closed.count("| SVD·H + PS, RTN head | integer | 50.0 % (2/4)") == 2 and "GPTQ head" not in closed
    for change in (*COMBINATIONS.values(), *CHANGES):
        assert actions.count(f"| {change.label} | integer | 1.23e-02 | 1.23e-02 |") == 1
        assert all(section.count(f"| {change.label} | 0.1000 | 0.2000 |") == 1 for section in layers)
    assert "87.75" in published and "87.75" not in page
    with (tmp_path / "ablation.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(cells)


def test_a_part_of_the_cells_is_rendered(cells: list[Cell], tmp_path: Path) -> None:
    results = fake_results(cells)
    for key in ("twin-full-precision", "policy-omega-int4", "twin-omega-qvla-svd-ps-rtn"):
        del results[key]
    STUDY.render(results, tmp_path)
    page = (tmp_path / "ablation.md").read_text()
    assert "| omega-int4 | integer | – | 1.23e-02 |" in page
    STUDY.render({"policy-full-precision": results["policy-full-precision"]}, tmp_path)
