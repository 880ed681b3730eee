"""A value of every layer under several variants: rows out of cells, means by part and kind of layer, their plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from omega_qvla.studies.rendering import COLOURS, MARKERS, NOTHING
from omega_qvla.studies.study import Result

Row = Mapping[str, Any]
"""One layer under one variant: `source`, `variant`, `part`, `depth`, `kind`, and values by name."""


def layer_rows(results: Iterable[Result]) -> dict[str, list[Row]]:
    """By source, the layers of results that have `source`, `variant` and `layers`, in their order."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for result in results:
        origin = {"source": result["source"], "variant": result["variant"]}
        rows[result["source"]] += [origin | layer for layer in result["layers"]]
    return dict(rows)


def by_kind(rows: Sequence[Row], value: str) -> dict[str, dict[str, list[float]]]:
    """The value of all layers by `part kind` and variant, in the order of the rows."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[f"{row['part']} {row['kind']}"][row["variant"]].append(row[value])
    return {kind: dict(variants) for kind, variants in found.items()}


def mean_table(rows: Sequence[Row], value: str, variants: Iterable[str]) -> list[list[str]]:
    """Lines of a table: `part kind`, then the mean over its layers under each variant that was measured."""
    return [
        [kind, *(f"{mean(found[variant]):.3g}" if variant in found else NOTHING for variant in variants)]
        for kind, found in by_kind(rows, value).items()
    ]


def part_mean(rows: Sequence[Row], value: str, variant: str, part: str) -> float:
    """Mean over the layers of a part. Raises `statistics.StatisticsError` if the variant was not measured."""
    return mean(row[value] for row in rows if row["variant"] == variant and row["part"] == part)


def plot_by_kind(axes: Axes, rows: Sequence[Row], value: str, variants: Iterable[str]) -> None:
    """One line per kind; per variant a small dot for each layer and a marker at their mean, on a log axis."""
    kinds, names = by_kind(rows, value), list(variants)
    for number, variant in enumerate(names):
        shift = 0.8 * ((number + 0.5) / len(names) - 0.5)
        measured = {line + shift: found[variant] for line, found in enumerate(kinds.values()) if variant in found}
        dots = [(value, y) for y, values in measured.items() for value in values]
        axes.plot([x for x, _ in dots], [y for _, y in dots], ".", ms=3, alpha=0.6, color=COLOURS[number])
        axes.plot([mean(values) for values in measured.values()], list(measured), **_marker(number))
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    for line in range(1, len(kinds)):
        axes.axhline(line - 0.5, color="0.8", lw=0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def legend_handles(labels: Iterable[str]) -> list[Line2D]:
    """For what `plot_by_kind` draws, one per variant."""
    return [Line2D([], [], label=label, **_marker(number)) for number, label in enumerate(labels)]


def _marker(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number], "marker": MARKERS[number], "ms": 5, "ls": ""}
