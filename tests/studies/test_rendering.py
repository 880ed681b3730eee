from __future__ import annotations

import csv
from pathlib import Path

from omega_qvla.studies.rendering import figure, markdown_table, write_csv


def test_markdown_cells_stay_in_their_columns() -> None:
    assert markdown_table(["a", "b"], [["|x|", "y"]]) == "| a | b |\n| --- | --- |\n| \\|x\\| | y |\n"


def test_csv_is_read_back(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [{"a": 1, "b": "x, y"}, {"a": None, "b": 0.5}])
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x, y"}, {"a": "", "b": "0.5"}]


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with figure(tmp_path / f"{name}.svg", 2, 2) as drawn:
            drawn.subplots().plot([1, 2], [3, 4], label="Ω")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()
