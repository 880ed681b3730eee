"""Published tables: whole, cited, and apart from what is measured."""

from __future__ import annotations

import pytest

from omega_qvla.studies.published import published_section, published_tables


@pytest.mark.parametrize("key", published_tables())
def test_tables_are_rectangular_and_cited(key: str) -> None:
    table = published_tables()[key]
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert ", Table " in table.source and table.source in table.markdown()


@pytest.mark.parametrize("key", [key for key, table in published_tables().items() if "Long" in table.columns])
def test_averages_are_those_of_their_suites(key: str) -> None:
    table = published_tables()[key]
    for row in table.rows:
        suites = [float(row[table.columns.index(suite)]) for suite in ("Object", "Spatial", "Goal", "Long")]
        assert float(row[table.columns.index("average")]) == pytest.approx(sum(suites) / 4, abs=0.051)


def test_a_section_is_marked_as_published() -> None:
    section = published_section("omega-qvla-table-1", "omega-qvla-table-4")
    assert section.startswith("## Published, not measured here\n")
    assert "Published (Ω-QVLA, Table 1)" in section and "Published (Ω-QVLA, Table 4)" in section
