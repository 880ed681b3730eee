"""Weights alone are rounded, and the solvers keep their order."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest

from omega_qvla.studies import weight_solver
from omega_qvla.studies.study import Options, Result
from omega_qvla.studies.weight_solver import SOLVERS, STUDY, recipe


@pytest.fixture(scope="module")
def results(computed: Callable[..., dict[str, Result]]) -> dict[str, Result]:
    return computed(weight_solver)


def test_no_recipe_rounds_activations() -> None:
    for solver in SOLVERS.values():
        rules = [rule.quantize for rule in recipe(solver).rules if rule.quantize is not None]
        assert len(rules) == 2 and not any(spec.activation.rounds for spec in rules)


def test_every_layer_once_and_gptq_below_rtn(results: dict[str, Result]) -> None:
    assert list(results) == [f"{source}-{variant}" for source in ("policy", "twin") for variant in SOLVERS]
    errors = {}
    for key, result in results.items():
        assert len(result["layers"]) == 28
        assert all(layer["relative_error"] == pytest.approx(layer["nmse"] ** 0.5) for layer in result["layers"])
        errors[key] = mean(layer["relative_error"] for layer in result["layers"])
    assert errors["policy-gptq"] < errors["policy-rtn"]
    assert errors["policy-gptq-blockwise"] < errors["policy-rtn"]
    assert errors["policy-rtn-groups"] < errors["policy-rtn"]


def test_rendering(results: dict[str, Result], options: Options, tmp_path: Path) -> None:
    STUDY.render(results, tmp_path)
    text = (tmp_path / "weight-solver.md").read_text()
    assert "## twin" in text and "Published, not measured here" in text
    with (tmp_path / "weight-solver.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 28 * len(results)
    assert (tmp_path / "weight-solver.svg").read_text().count("<svg") == 1


def test_what_is_missing_is_left_out(results: dict[str, Result], tmp_path: Path) -> None:
    STUDY.render({key: results[key] for key in ("policy-rtn", "policy-gptq", "twin-gptq")}, tmp_path)
    text = (tmp_path / "weight-solver.md").read_text()
    assert text.count("Some solvers are missing") == 2 and "–" in text
