"""What a rotation does to the input and the output error of every layer (Ω-QVLA Figures 6 and 9, Appendix A.5)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

import torch
from torch import Tensor

from omega_qvla.evaluation.results import write_text
from omega_qvla.numerics.quantizer import percentile
from omega_qvla.runtime import DenoisingStep, QuantizedInput
from omega_qvla.spec import Recipe, read_recipe, with_settings
from omega_qvla.studies.cells import recipe_cells
from omega_qvla.studies.layers import Row, layer_rows, legend_handles, mean_table, plot_by_kind
from omega_qvla.studies.published_layers import ROTATIONS as PUBLISHED_ROTATIONS
from omega_qvla.studies.published_layers import published_layers
from omega_qvla.studies.rendering import COLOURS, MARKERS, figure, markdown_table, write_csv
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.workbench import layer_records, open_workbench

LABELS = {"none": "no rotation", "svd": "SVD", "hadamard": "H", "svd_hadamard": "SVD·H"}
ROW_PERCENTILE = 99.0


def recipe(rotation: str) -> Recipe:
    """RTN at W4A4, one scale per output channel and token, on balanced and rotated blocks of each linear's own."""
    settings = ("transform.permutation=zigzag", f"transform.rotation={rotation}", "transform.sharing=linear")
    return with_settings(read_recipe("rtn"), settings, f"RTN, {LABELS[rotation]}")


def row_maximum(transformed: Tensor) -> float:
    """99th percentile over the tokens of max |x'|, for X' [tokens, in]: what sets the largest scales."""
    return percentile(transformed.abs().amax(1, keepdim=True), ROW_PERCENTILE).item()


@torch.no_grad()
def measure(source: str, checkpoint: Path, variant: str) -> Result:
    """Normalized output error of every layer on held-out inputs, and the row maximum of its rotated input."""
    bench = open_workbench(checkpoint)
    quantized = bench.quantize(recipe(variant))
    layers = layer_records(bench, bench.output_errors(quantized))
    for record, site in zip(layers, quantized.sites, strict=True):  # one linear to a site: nothing is shared
        x = torch.cat(list(bench.inputs[site.linears[0].name].values()))
        transform = QuantizedInput(site, DenoisingStep(bench.policy.denoising_steps)).transform
        record["row_max"] = row_maximum(transform(x))
        record["row_max_ratio"] = record["row_max"] / row_maximum(x)
    return {"source": source, "variant": variant, "layers": layers}


@dataclass(frozen=True)
class RotationStudy:
    """See `omega_qvla.studies.study.Study`."""

    name: str = "rotation"
    summary: str = (
        "Normalized output error of every layer at W4A4 by rotation, and the 99th percentile over tokens of the "
        "largest rotated input. RTN, one scale per output channel and per token; blocks of 64 balanced by zigzag."
    )
    published: str = "Ω-QVLA Figures 6 and 9"

    def cells(self, options: Options) -> list[Cell]:
        return recipe_cells(options, {rotation: recipe(rotation) for rotation in LABELS}, measure)

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        sources = layer_rows(results.values())
        write_csv(out / f"{self.name}.csv", [row for rows in sources.values() for row in rows])
        write_text(out / f"{self.name}.md", self._page(sources))
        with figure(out / f"{self.name}.svg", 9.4, 0.8 + 4.8 * len(sources)) as drawn:
            panels = drawn.subplots(len(sources), 2, sharey=True, sharex="col", squeeze=False)
            for (left, right), (source, rows) in zip(panels, sources.items(), strict=True):
                plot_by_kind(left, rows, "nmse", LABELS)
                plot_by_kind(right, rows, "row_max", LABELS)
                left.set_title(f"{source}: normalized output error, W4A4")
                right.set_title(f"{source}: 99th percentile of max |x'|")
            drawn.legend(handles=legend_handles(LABELS.values()), loc="outside upper left", ncols=4)
        _published_figure(out / f"{self.name}-published.svg")

    def _page(self, sources: Mapping[str, Sequence[Row]]) -> str:
        parts = [f"# {self.name}\n\n{self.summary}\n\n![{self.name}]({self.name}.svg)\n"]
        for source, rows in sources.items():
            parts.append(f"## {source}\n\n{seen(rows)}\n")
            for value, what in (("nmse", "nMSE"), ("row_max_ratio", "row maximum in units of that without")):
                columns = [f"{what}, mean over layers", *LABELS.values()]
                parts.append(markdown_table(columns, mean_table(rows, value, LABELS)))
        parts.append(f"## Published, not measured here\n\n![published]({self.name}-published.svg)\n")
        parts += [table.table().markdown() for table in published_layers()]
        return "\n".join(parts)


def seen(rows: Sequence[Row]) -> str:
    """Two sentences about one source: the gain of each rotation, and where it is not the least error."""
    if {row["variant"] for row in rows} != set(LABELS):
        return "Some rotations are missing."
    gains = ", ".join(f"{label} {_gain(rows, key):.2f}" for key, label in LABELS.items() if key != "none")
    best = [min(LABELS, key=lambda key: errors[key]) for errors in _by_layer(rows).values()]
    wins = ", ".join(f"{label} in {best.count(key)}" for key, label in LABELS.items())
    return (
        f"Output error in units of that without rotation, geometric mean over the layers: {gains}. "
        f"Of {len(best)} layers the error is least with {wins}."
    )


def _by_layer(rows: Sequence[Row]) -> dict[tuple[str, int, str], dict[str, float]]:
    """Normalized output error by layer and rotation."""
    found: dict[tuple[str, int, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        found[row["part"], row["depth"], row["kind"]][row["variant"]] = row["nmse"]
    return found


def _gain(rows: Sequence[Row], rotation: str) -> float:
    return geometric_mean(errors[rotation] / errors["none"] for errors in _by_layer(rows).values())


def _published_figure(path: Path) -> None:
    tables = published_layers()
    with figure(path, 9.4, 0.8 + 2.9 * len(tables)) as drawn:
        panels = drawn.subplots(len(tables), 2, sharey="row", sharex="col", squeeze=False)
        for (left, right), table in zip(panels, tables, strict=True):
            lines = range(len(table.layers))
            for index, rotation in enumerate(PUBLISHED_ROTATIONS):
                number = list(LABELS).index(rotation)
                style = {"color": COLOURS[number], "marker": MARKERS[number], "ms": 5, "ls": ""}
                left.plot([layer.nmse[index] for layer in table.layers], lines, **style)
                right.plot([layer.row_max[index] for layer in table.layers], lines, **style)
            for axes, what in ((left, "nMSE, W4A4"), (right, "q99 of max |x'|")):
                axes.set_xscale("log")
                axes.grid(axis="both")
                axes.set_title(f"published, {table.policy}: {what}")
            left.set_yticks(lines, [layer.layer for layer in table.layers])
            left.set_ylim(len(table.layers) - 0.5, -0.5)
        handles = [handle for handle in legend_handles(LABELS.values()) if handle.get_label() != LABELS["hadamard"]]
        drawn.legend(handles=handles, loc="outside upper left", ncols=3)


STUDY = RotationStudy()
