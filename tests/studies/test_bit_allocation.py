"""Costs of sampled channels and what a budget buys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omega_qvla.studies import bit_allocation
from omega_qvla.studies.bit_allocation import BUDGETS, PARTS, STUDY
from omega_qvla.studies.study import Result


def test_costs_and_budgets(computed: Callable[..., dict[str, Result]], tmp_path: Path) -> None:
    results = computed(bit_allocation, SAMPLED=6)
    found = results["policy"]
    assert len(found["channels"]) == 6
    assert all(row["proxy"] > 0 and row["exact"] >= 0 for row in found["channels"])
    assert {kind.split()[0] for kind in found["budgets"][0]["channels"]} == set(PARTS)
    for budget, row in zip(BUDGETS, found["budgets"], strict=True):
        assert row["average_bits"] == budget
        assert 0.98 * row["allowed_bytes"] < row["bytes"] <= row["allowed_bytes"]
    STUDY.render(results, tmp_path)
    page = (tmp_path / "bit-allocation.md").read_text()
    assert "Spearman" in page and "Published, not measured here" in page
    assert (tmp_path / "bit-allocation.svg").exists() and (tmp_path / "bit-allocation.csv").exists()
