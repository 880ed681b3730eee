"""The tables' statistics are those of `evaluation.statistics`, and Holm's those of closed testing."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from omega_qvla.evaluation.statistics import compare, success_rate
from omega_qvla.studies.comparison import COLUMNS, compare_with_full_precision, csv_row, explanation, holm, table


def result(
    label: str, successes: list[bool], recipe: dict[str, Any] | None, nmse: float | None = None
) -> dict[str, Any]:
    found = {
        "source": "policy",
        "label": label,
        "recipe": recipe,
        "execution": "float" if recipe is None else "integer",
        "bytes": {"codes": None, "scales": None, "total": 4_000_000},
        "episodes": [["reach-v3", seed, success, 80] for seed, success in enumerate(successes)],
    }
    return found if nmse is None else found | {"action_nmse": nmse}


FULL = [True] * 30 + [False] * 10
WORSE = [True] * 12 + [False] * 28
LIKE = [True] * 29 + [False] * 10 + [True]


@pytest.fixture
def results() -> dict[str, dict[str, Any]]:
    return {
        "worse": result("worse", WORSE, {}, 0.5),
        "full": result("full precision", FULL, None),
        "like": result("like", LIKE, {}, 0.01),
        "unrun": result("unrun", [], {}, 0.02),
    }


def test_each_variant_is_paired_with_full_precision(results: dict[str, dict[str, Any]]) -> None:
    judged = compare_with_full_precision(results)
    for key, outcomes in (("worse", WORSE), ("like", LIKE)):
        assert judged[key].success == success_rate(sum(outcomes), len(outcomes))
        assert judged[key].paired == compare(dict(enumerate(outcomes)), dict(enumerate(FULL)))
    assert judged["full"].success == success_rate(30, 40) and judged["full"].paired is None
    assert judged["unrun"].success is None and judged["unrun"].paired is None and judged["unrun"].holm is None


def test_only_tested_variants_count_for_holm(results: dict[str, dict[str, Any]]) -> None:
    judged = compare_with_full_precision(results)
    worse, like = judged["worse"].paired, judged["like"].paired
    assert worse is not None and like is not None
    assert [judged["worse"].holm, judged["like"].holm] == holm([worse.p_value, like.p_value])
    assert "2 variants were tested, of which 0.1 would be expected" in explanation(judged)


def test_without_full_precision_nothing_is_paired(results: dict[str, dict[str, Any]]) -> None:
    del results["full"]
    assert all(found.paired is None and found.holm is None for found in compare_with_full_precision(results).values())


def test_other_episodes_are_refused(results: dict[str, dict[str, Any]]) -> None:
    results["like"]["episodes"].pop()
    with pytest.raises(ValueError, match="different episodes"):
        compare_with_full_precision(results)


def test_holm_is_closed_testing_with_bonferroni() -> None:
    generator = np.random.default_rng(0)
    for size in range(1, 6):
        values = generator.uniform(0, 0.3, size).round(2).tolist()
        subsets = [s for n in range(1, size + 1) for s in combinations(range(size), n)]
        for index, adjusted in enumerate(holm(values)):
            local = [min(1.0, len(s) * min(values[i] for i in s)) for s in subsets if index in s]
            assert adjusted == pytest.approx(max(local))
    assert holm([]) == []


def test_the_table_says_what_is_separable(results: dict[str, dict[str, Any]]) -> None:
    judged = compare_with_full_precision(results)
    lines = table(judged, {key: (key,) for key in judged}, ("variant",)).splitlines()
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:])}
    columns = {name: number for number, name in enumerate(COLUMNS)}
    assert rows["worse"][columns["separable"]] == rows["worse"][columns["separable, Holm"]] == "yes"
    assert rows["like"][columns["separable"]] == "no"
    assert rows["full"][columns["separable"]] == "–" and rows["full"][columns["action nMSE"]] == "–"
    assert rows["unrun"][columns["success"]] == "–" and rows["unrun"][columns["action nMSE"]] == "2.00e-02"
    assert rows["like"][columns["wins–losses"]] == "1–1"


def test_csv_rows_have_the_same_columns(results: dict[str, dict[str, Any]]) -> None:
    rows = [csv_row(found) for found in compare_with_full_precision(results).values()]
    assert len({tuple(row) for row in rows}) == 1
    worse = rows[0]
    assert (worse["successes"], worse["episodes"], worse["losses"]) == (12, 40, 18)
