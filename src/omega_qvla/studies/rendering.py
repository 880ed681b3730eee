"""How studies are shown: Markdown tables, CSV files and plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from omega_qvla.evaluation.results import write_text

NOTHING = "–"
"""In place of a figure that does not exist."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#9467bd", "#8c564b", "#3a3a3a")
"""Okabe and Ito's colours, told apart by colour-blind readers, and three more."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REFERENCE_COLOUR = "#8a8a8a"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "omega-qvla",
    "font.size": 9.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": REFERENCE_COLOUR,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
}


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its last line ended."""
    cells = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row; the columns are the keys of the first, and every row has the same."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in inches that is written to the SVG file when the block ends."""
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        text = io.StringIO()
        drawn.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    write_text(path, text.getvalue())
