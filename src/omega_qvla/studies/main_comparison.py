"""Ω-QVLA's Table 1 on our policy: every method at its widths, and the table continued below four bits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from matplotlib.axes import Axes

from omega_qvla.evaluation.results import write_text
from omega_qvla.spec import Recipe, read_recipe, with_scope, with_settings
from omega_qvla.studies.comparison import Judged, compare_with_full_precision, csv_row, explanation, table
from omega_qvla.studies.published import published_section
from omega_qvla.studies.rendering import COLOURS, MARKERS, REFERENCE_COLOUR, figure, write_csv
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.sweep import FULL_PRECISION, Variant, full_precision, variant_cell

EPISODES = 10
"""Per task."""
ALL: Final = "all"
WITHOUT_HEAD_ATTENTION: Final = "without head attention"
OWN: Final = "vision and language"


@dataclass(frozen=True)
class Row:
    """A method of the table. `layers`: all linears of language and head, those besides the head's attention, or
    those that the recipe itself names (QVLA: vision and language)."""

    recipe: str
    width: str
    layers: Literal["all", "without head attention", "vision and language"] = ALL

    @property
    def key(self) -> str:
        suffix = "-without-head-attention" if self.layers == WITHOUT_HEAD_ATTENTION else ""
        return f"{self.recipe}-{self.width.lower()}{suffix}"


ROWS = (
    Row("gptq", "W4A16", WITHOUT_HEAD_ATTENTION),
    Row("awq", "W4A16", WITHOUT_HEAD_ATTENTION),
    Row("omniquant", "W4A16", WITHOUT_HEAD_ATTENTION),
    Row("quantvla", "W4A8", WITHOUT_HEAD_ATTENTION),
    Row("quantvla", "W4A4", WITHOUT_HEAD_ATTENTION),
    Row("rtn", "W4A16"),
    Row("gptq", "W4A16"),
    Row("awq", "W4A16"),
    Row("omniquant", "W4A16"),
    Row("qvla", "W4A16", OWN),
    Row("rtn", "W8A8"),
    Row("smoothquant", "W8A8"),
    Row("rtn", "W4A8"),
    Row("smoothquant", "W4A8"),
    Row("duquant", "W4A8"),
    Row("quantvla", "W4A8"),
    Row("qvla", "W4A8", OWN),
    Row("rtn", "W4A4"),
    Row("smoothquant", "W4A4"),
    Row("duquant", "W4A4"),
    Row("quantvla", "W4A4"),
    Row("qvla", "W4A4", OWN),
    Row("omega-qvla", "W4A4"),
    Row("omega-qvla-released", "W4A4"),
    Row("omega-int4", "W4A4"),
    Row("rtn", "W3A3"),
    Row("smoothquant", "W3A3"),
    Row("duquant", "W3A3"),
    Row("omega-qvla", "W3A3"),
    Row("omega-int4", "W3A3"),
    Row("rtn", "W2A4"),
    Row("smoothquant", "W2A4"),
    Row("duquant", "W2A4"),
    Row("omega-qvla", "W2A4"),
    Row("omega-int4", "W2A4"),
)
WIDTHS = ("W4A16", "W8A8", "W4A8", "W4A4", "W3A3", "W2A4")
"""As they are plotted."""
METHODS = tuple(method for method, _ in Counter(row.recipe for row in ROWS).most_common())
"""Those with the longest lines first, so that lines do not share colours."""


def recipe_of(row: Row) -> Recipe:
    """The recipe of a row, at its width and on its layers. Raises `RecipeError` if there is none."""
    recipe = at_width(read_recipe(row.recipe), row.width)
    if row.layers == OWN:
        return recipe
    # QuantVLA's recipe keeps the head's attention by itself; the table has it with and without.
    return with_scope(recipe, "full" if row.layers == ALL else "without-head-attention")


def at_width(recipe: Recipe, width: str) -> Recipe:
    """The recipe at a width such as `W4A8`; where it allocates bits to channels, W is their average.

    Raises `ValueError` for what is no width, `RecipeError` for bits that are not allowed.
    """
    match = re.fullmatch(r"W(\d+)A(\d+)", width)
    if match is None:
        raise ValueError(f"{width!r} is no width; write for example W4A8")
    specs = [rule.quantize for rule in recipe.rules if rule.quantize is not None]
    weight = (
        "weight.bits" if all(spec.weight.allocation is None for spec in specs) else "weight.allocation.average_bits"
    )
    settings = [f"{weight}={match[1]}", f"activation.bits={match[2]}"]
    return with_settings(recipe, settings, f"{recipe.name} {width}")


@dataclass(frozen=True)
class MainComparison:
    """See `omega_qvla.studies.study.Study`."""

    name: str = "main-comparison"
    summary: str = "Success and action error of every method at every width, with paired statistics"
    published: str = "Ω-QVLA Table 1; QuantVLA Table 2; QVLA Tables 1 and 2"

    def cells(self, options: Options) -> list[Cell]:
        """Full precision, then W4A4 of every method, then the other widths; each on all sources."""
        episodes = EPISODES if options.episodes is None else options.episodes
        rows = sorted(ROWS, key=lambda row: row.width != "W4A4")
        variants = [Variant(row.key, f"{row.recipe} {row.width}", recipe_of(row), episodes) for row in rows]
        return [
            variant_cell(options, source, variant)
            for variant in (full_precision(episodes), *variants)
            for source in options.sources
        ]

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        """One table and one column of plots per source."""
        sources = {
            source: compare_with_full_precision(_in_table_order(source, results))
            for source in dict.fromkeys(result["source"] for result in results.values())
        }
        layers = {row.key: row.layers for row in ROWS}
        parts = [f"# {self.summary}\n\n![success and action error by width]({self.name}.svg)\n"]
        for source, judged in sources.items():
            heads = {key: (found.result["label"], layers.get(key, "none")) for key, found in judged.items()}
            shown = table(judged, heads, ("method", "layers"))
            parts.append(f"## Measured: {source}\n\n{shown}\n{explanation(judged)}")
        parts.append(published_section("omega-qvla-table-1", "quantvla-table-2", "qvla-table-1", "qvla-table-2"))
        write_text(out / f"{self.name}.md", "\n".join(parts))
        rows = [
            csv_row(found) | {"layers": layers.get(key, "none")}
            for judged in sources.values()
            for key, found in judged.items()
        ]
        write_csv(out / f"{self.name}.csv", rows)
        _plot(sources, out / f"{self.name}.svg")


def _in_table_order(source: str, results: Mapping[str, Result]) -> dict[str, Result]:
    """The finished rows of one source, by row instead of cell."""
    keys = (FULL_PRECISION, *(row.key for row in ROWS))
    return {key: results[f"{source}-{key}"] for key in keys if f"{source}-{key}" in results}


def _plot(sources: Mapping[str, Mapping[str, Judged]], path: Path) -> None:
    """Success above, action error below, over the width; rows without head attention are left out."""
    with figure(path, 4.6 * len(sources), 6.6) as drawn:
        axes = drawn.subplots(2, len(sources), sharex=True, sharey="row", squeeze=False)
        for column, (source, judged) in enumerate(sources.items()):
            axes[0][column].set_title(source)
            full = judged.get(FULL_PRECISION)
            if full is not None and full.success is not None:
                axes[0][column].axhline(100 * full.success.rate, color=REFERENCE_COLOUR, ls="--")
            for number, method in enumerate(METHODS):
                _plot_method(axes[0][column], axes[1][column], method, number, judged)
        axes[0][0].set_ylabel("success, % (line: full precision)")
        axes[1][0].set_ylabel("action error (normalized MSE)")
        handles = {handle.get_label(): handle for cell in axes[1] for handle in cell.get_lines()}
        drawn.legend(handles=[*handles.values()], loc="outside lower center", ncols=4)


def _plot_method(success: Axes, error: Axes, method: str, number: int, judged: Mapping[str, Judged]) -> None:
    rows = [row for row in ROWS if row.recipe == method and row.layers != WITHOUT_HEAD_ATTENTION]
    label = method if rows[0].layers == ALL else f"{method} ({rows[0].layers})"
    style: dict[str, Any] = {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1,
        "label": label,
    }
    found = [(WIDTHS.index(row.width) + 0.06 * (number - 5), judged[row.key]) for row in rows if row.key in judged]
    rates = [(x, one.success) for x, one in found if one.success is not None]
    if rates:
        success.plot([x for x, _ in rates], [100 * rate.rate for _, rate in rates], **style)
        low, high = [100 * rate.low for _, rate in rates], [100 * rate.high for _, rate in rates]
        success.vlines([x for x, _ in rates], low, high, color=style["color"], linewidth=0.7)
    if found:
        error.semilogy([x for x, _ in found], [one.result["action_nmse"] for _, one in found], **style)
    error.set_xticks(range(len(WIDTHS)), WIDTHS)
    success.grid(axis="y")
    error.grid(axis="y")


STUDY = MainComparison()
