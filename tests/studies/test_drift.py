"""Magnitudes and errors by denoising step."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import torch

from omega_qvla.studies import drift
from omega_qvla.studies.drift import MODES, STUDY, magnitude, recipe
from omega_qvla.studies.study import Result


def drifting(factors: list[float]) -> Result:
    """Two kinds of input of one layer: one that changes by the factors and costs twice, one that stays."""
    steps = len(factors)
    moving = {"input": "attention input", "magnitude": factors, "per_step": [0.1] * steps, "static": [0.2] * steps}
    still = {"input": "MLP input", "magnitude": [1.0] * steps, "per_step": [0.3] * steps, "static": [0.3] * steps}
    return {"source": "policy", "inputs": [moving | {"depth": 0}, still | {"depth": 0}]}


def test_magnitude_is_a_percentile_of_all_entries() -> None:
    x = torch.arange(1.0, 1501.0).view(75, 20) * torch.tensor([1.0, -1.0]).repeat(10)
    assert magnitude(x) == 1499
    assert magnitude(3 * x) == 3 * magnitude(x)


def test_recipes_differ_in_the_scales_of_the_head_alone() -> None:
    for mode in MODES:
        specs = {rule.part: rule.quantize for rule in recipe(mode).rules if rule.quantize is not None}
        assert set(specs) == {"action"} and specs["action"].activation.mode == mode


def test_what_drifts_and_costs_is_named(tmp_path: Path) -> None:
    STUDY.render({"policy": drifting([1.0, 0.9, 0.8])}, tmp_path)
    page = (tmp_path / "drift.md").read_text()
    assert "attention input (-20%)" in page and "MLP input (+0%)" in page
    assert "+50.0% on average and most at the attention input (+100.0%)" in page


def test_cells_hold_every_input_of_the_head(computed: Callable[..., dict[str, Result]], tmp_path: Path) -> None:
    results = computed(drift)
    inputs = results["policy"]["inputs"]
    assert [(found["depth"], found["input"]) for found in inputs[:4]] == [
        (0, kind) for kind in ("attention input", "attention output", "MLP input", "MLP hidden")
    ]
    assert len(inputs) == 8
    for found in inputs:
        assert found["magnitude"][0] == 1 and {len(found[key]) for key in ("magnitude", *MODES)} == {10}
        assert min(found["per_step"] + found["static"]) > 0
    STUDY.render(results, tmp_path)
    with (tmp_path / "drift.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 8 * 10
    text = (tmp_path / "drift.md").read_text()
    assert "Published, not measured here" in text and (tmp_path / "drift.svg").exists()
