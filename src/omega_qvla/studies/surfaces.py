"""Magnitudes |X R| per token and channel of one layer of each part under four transforms (Ω-QVLA Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from omega_qvla.evaluation.results import write_text
from omega_qvla.pack.site import PackedSite
from omega_qvla.runtime import DenoisingStep, QuantizedInput
from omega_qvla.spec import Part, Recipe, read_recipe, recipe_to_dict, with_settings
from omega_qvla.studies.rendering import figure, markdown_table, write_csv
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.sweep import digest
from omega_qvla.studies.workbench import Workbench, open_workbench

TRANSFORMS = {
    "identity": ("none", "none"),
    "permutation": ("zigzag", "none"),
    "SVD": ("zigzag", "svd"),
    "SVD·H": ("zigzag", "svd_hadamard"),
}
"""Permutation and rotation of each panel, in the order of the figure."""
PARTS: tuple[Part, ...] = ("language", "action")
TOKENS = 24
"""Shown, evenly spaced among the held-out tokens."""
CHANNELS = 128
"""Shown at most; each is the largest of as many neighbouring channels as a wider layer needs."""


def recipe(label: str) -> Recipe:
    """RTN, which needs no calibration, with the panel's transform for each linear of its own."""
    permutation, rotation = TRANSFORMS[label]
    settings = (f"transform.permutation={permutation}", f"transform.rotation={rotation}", "transform.sharing=linear")
    return with_settings(read_recipe("rtn"), settings, label)


def channel_ratio(x: Tensor) -> float:
    """Largest over median peak of the channels of X [tokens, in]."""
    peak = x.abs().amax(0)
    return (peak.amax() / peak.median()).item()


def surface(x: Tensor) -> np.ndarray:
    """|x| of evenly spaced tokens, [at most TOKENS, at most CHANNELS]; neighbouring channels by their largest."""
    chosen = x[torch.linspace(0, len(x) - 1, min(TOKENS, len(x))).round().long()].abs()
    return chosen.unflatten(1, (min(CHANNELS, x.shape[1]), -1)).amax(-1).numpy()


@torch.no_grad()
def measure(source: str, checkpoint: Path) -> Result:
    """The layer of each part whose input has the highest channel ratio, and its surfaces."""
    bench = open_workbench(checkpoint)
    sites = {label: {s.linears[0].name: s for s in bench.quantize(recipe(label)).sites} for label in TRANSFORMS}
    layers = []
    for part in PARTS:
        inputs = {name: _tokens(bench, name) for name, layer in bench.layers.items() if layer.part == part}
        name = max(inputs, key=lambda linear: channel_ratio(inputs[linear]))
        panels = [
            _panel(sites[label][name], label, inputs[name], bench.policy.denoising_steps) for label in TRANSFORMS
        ]
        label = f"{part} {bench.layers[name].depth} {bench.layers[name].kind}"
        layers.append({"layer": label, "channels": inputs[name].shape[1], "panels": panels})
    return {"source": source, "layers": layers}


@dataclass(frozen=True)
class Surfaces:
    """See `omega_qvla.studies.study.Study`."""

    name: str = "surfaces"
    summary: str = (
        "|X R| by token and channel of the layer of each part whose input has the highest ratio of largest to median "
        "channel peak, under no transform, the balancing permutation, SVD and SVD·H in blocks of 64. Peaks are over "
        f"all held-out tokens, of which {TOKENS} are shown; colours are those of a square root."
    )
    published: str = "Ω-QVLA Figure 3"

    def cells(self, options: Options) -> list[Cell]:
        recipes = {label: recipe_to_dict(recipe(label)) for label in TRANSFORMS}
        what = {"recipes": recipes, "tokens": TOKENS, "channels": CHANNELS}
        return [
            Cell(
                source,
                {"source": source, "checkpoint": digest(checkpoint)} | what,
                partial(measure, source, checkpoint),
            )
            for source, checkpoint in options.sources.items()
        ]

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        layers = [{"source": result["source"]} | layer for result in results.values() for layer in result["layers"]]
        rows = [_summary(layer, panel) for layer in layers for panel in layer["panels"]]
        write_csv(out / f"{self.name}.csv", rows)
        table = markdown_table(list(rows[0]), [[_text(value) for value in row.values()] for row in rows])
        page = f"# {self.name}\n\n{self.summary}\n\n![{self.name}]({self.name}.svg)\n\n{seen(layers)}\n\n{table}"
        write_text(out / f"{self.name}.md", page)
        with figure(out / f"{self.name}.svg", 9.4, 0.4 + 2.1 * len(layers)) as drawn:
            grid = drawn.subplots(len(layers), len(TRANSFORMS), sharex="row", sharey=True, squeeze=False)
            for line, layer in zip(grid, layers, strict=True):
                _plot_layer(drawn, line, layer)


def seen(layers: Sequence[Mapping[str, Any]]) -> str:
    """Two sentences: what SVD and SVD·H leave of each layer's peak, and whether it falls with every transform."""
    peaks = {
        f"{layer['source']} {layer['layer']}": {panel["transform"]: panel["peak"] for panel in layer["panels"]}
        for layer in layers
    }
    shares = "; ".join(
        f"{name} {found['SVD'] / found['identity']:.0%} and {found['SVD·H'] / found['identity']:.0%}"
        for name, found in peaks.items()
    )
    falling = sum(list(found.values()) == sorted(found.values(), reverse=True) for found in peaks.values())
    return (
        f"Of the peak without a transform SVD and SVD·H leave: {shares}. From panel to panel it never rises in "
        f"{falling} of {len(peaks)} layers (published: it falls on both models)."
    )


def _tokens(bench: Workbench, linear: str) -> Tensor:
    return torch.cat(list(bench.inputs[linear].values()))


def _panel(site: PackedSite, label: str, x: Tensor, steps: int) -> dict[str, Any]:
    """Peak, ratio and surface of X' as JSON; a row of the surface is one token's magnitudes, to two digits."""
    transformed = QuantizedInput(site, DenoisingStep(steps)).transform(x)
    return {
        "transform": label,
        "peak": transformed.abs().amax().item(),
        "channel_ratio": channel_ratio(transformed),
        "surface": [" ".join(f"{value:.2g}" for value in row) for row in surface(transformed).tolist()],
    }


def _summary(layer: Mapping[str, Any], panel: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "source": layer["source"],
        "layer": layer["layer"],
        "transform": panel["transform"],
        "peak": panel["peak"],
        "channel max / median": panel["channel_ratio"],
    }


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _plot_layer(drawn: Figure, line: Sequence[Axes], layer: Mapping[str, Any]) -> None:
    """One heat map per transform on one scale of colours."""
    surfaces = [np.loadtxt(panel["surface"], ndmin=2) for panel in layer["panels"]]
    norm = PowerNorm(0.5, vmin=0, vmax=np.max(surfaces))
    for axes, panel, values in zip(line, layer["panels"], surfaces, strict=True):
        extent = (0, layer["channels"], len(values), 0)
        image = axes.imshow(values, extent=extent, aspect="auto", cmap="magma", norm=norm, interpolation="none")
        axes.set_title(f"{panel['transform']}: peak {panel['peak']:.3g}", fontsize=9)
        axes.set_xlabel("channel", fontsize=8)
    line[0].set_ylabel(f"{layer['source']}\n{layer['layer']}\ntoken", fontsize=8)
    drawn.colorbar(image, ax=list(line), pad=0.01)


STUDY = Surfaces()
