"""The ablation's variants on synthetic layers that have the outlier ratios published for pi0.5 and GR00T N1.5.

A layer is 1024 -> 1024 with Gaussian weights of uneven column energy. Its inputs are heavy-tailed tokens whose
channels have lognormal sizes, 12 of them raised until channel max / median of the peaks is as published; inputs of
the head shrink by 18 % over the denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.calibration import Needs, SiteStatistics
from omega_qvla.evaluation.results import write_text
from omega_qvla.pack.manifest import PlannedSite
from omega_qvla.quantization.site import Found, quantize_site
from omega_qvla.spec import Part, Recipe, read_recipe, recipe_to_dict, with_settings
from omega_qvla.studies import rotation
from omega_qvla.studies.ablation import VARIANTS as ABLATION
from omega_qvla.studies.layers import legend_handles, plot_by_kind
from omega_qvla.studies.published_layers import ROTATIONS as PUBLISHED_ROTATIONS
from omega_qvla.studies.published_layers import RotatedLayer, published_layers
from omega_qvla.studies.rendering import figure, markdown_table, write_csv
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.workbench import output_errors

STEPS, DRIFT, OUTLIER_SHARE = 10, 0.18, 12 / 1024
SEEDS = (0, 1)


@dataclass(frozen=True)
class SyntheticLayer:
    """A linear and its inputs."""

    part: Part
    kind: str
    ratio: float
    """Channel max / median of the published inputs."""
    width: int = 1024
    tokens: int = 256
    """As many for calibration as held out, in each denoising step."""

    @property
    def label(self) -> str:
        return f"{self.part} {self.kind}, {self.ratio:,.0f}x"


LAYERS = (
    SyntheticLayer("language", "q_proj", 12.4),
    SyntheticLayer("language", "gate_proj", 65.0),
    SyntheticLayer("language", "down_proj", 206.0),
    SyntheticLayer("language", "down_proj", 57_899.0),
    SyntheticLayer("action", "q_proj", 14.0),
    SyntheticLayer("action", "down_proj", 80.0),
)
"""Ratios of pi0.5 (layers 2, 8 and 14) and GR00T N1.5."""

METHODS = {
    "rtn": "RTN",
    "smoothquant": "SmoothQuant",
    "duquant": "DuQuant",
    "omega-qvla-svd-h-ps-rtn": "Ω-QVLA",
    "omega-qvla-released": "Ω-QVLA as released",
    "omega-int4": "omega-int4",
}
"""The methods at W4A4, by variant."""
ROTATIONS = {f"rtn-{key}": label for key, label in rotation.LABELS.items()}
"""The recipes of the rotation study, by variant."""


def recipes() -> dict[str, Recipe]:
    """Rotations, methods, and the variants of the ablation."""
    rotations = {f"rtn-{key}": rotation.recipe(key) for key in rotation.LABELS}
    methods = {
        name: with_settings(read_recipe(name), ["activation.bits=4"], f"{name}, W4A4")
        for name in ("smoothquant", "duquant", "omega-qvla-released")
    }
    changes = {c.key: with_settings(read_recipe(c.recipe), c.settings, c.label) for c in ABLATION}
    return rotations | methods | changes


def layer_error(recipe: Recipe, layer: SyntheticLayer, seed: int) -> float:
    """Normalized output error on held-out tokens of the layer under the recipe's first rule for its part."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(layer.width, layer.width, bias=False)
    energy = torch.exp(0.3 * torch.randn(layer.width, generator=generator))
    weight = torch.randn(layer.width, layer.width, generator=generator) / layer.width**0.5
    linear.weight = nn.Parameter(weight * energy, requires_grad=False)
    tokens = inputs(layer, generator)
    spec = next(rule.quantize for rule in recipe.rules if rule.part == layer.part)
    assert spec is not None
    statistics = SiteStatistics("layer", Needs(spec.needs_hessian, spec.needs_samples))
    for step, x in tokens.items():
        statistics.add(x[: layer.tokens], step)
    site = PlannedSite("layer", layer.part, "block", layer.width, ("layer",), 0)
    packed = quantize_site(site, spec, {"layer": linear.weight}, {}, Found(statistics), STEPS)
    held_out = {step: x[layer.tokens :] for step, x in tokens.items()}
    single = Single(nn.ModuleDict({"layer": linear}), STEPS)
    return output_errors(single, [packed], {"layer": held_out})["layer"].normalized


@dataclass
class Single:
    """What `output_errors` needs of a policy."""

    module: nn.Module
    denoising_steps: int


def inputs(layer: SyntheticLayer, generator: torch.Generator) -> dict[int | None, Tensor]:
    """Tokens [2 · tokens, width] by denoising step for the head, under None for the language model."""
    size = torch.exp(0.5 * torch.randn(layer.width, generator=generator))
    outliers = torch.randperm(layer.width, generator=generator)[: round(OUTLIER_SHARE * layer.width)]
    size[outliers] = size.median() * layer.ratio
    found: dict[int | None, Tensor] = {}
    for step in range(STEPS) if layer.part == "action" else [None]:
        tokens = torch.randn(2 * layer.tokens, layer.width, generator=generator)
        tokens *= torch.exp(0.3 * torch.randn(2 * layer.tokens, 1, generator=generator))
        found[step] = tokens * size * (1 - DRIFT * (step or 0) / (STEPS - 1))
    return found


def measure(variant: str) -> Result:
    """Normalized output error of every layer for each seed."""
    recipe = recipes()[variant]
    errors = [[layer_error(recipe, layer, seed) for seed in SEEDS] for layer in LAYERS]
    return {"variant": variant, "label": recipe.name, "nmse": errors}


@dataclass(frozen=True)
class SyntheticLayers:
    """See `omega_qvla.studies.study.Study`."""

    name: str = "synthetic-layers"
    summary: str = (
        "Normalized output error of synthetic layers with the published ratios of largest to median channel peak, "
        f"mean over {len(SEEDS)} seeds, on held-out tokens."
    )
    published: str = "Ω-QVLA Figures 6 and 9"

    def cells(self, options: Options) -> list[Cell]:
        """The same for all sources: nothing of a policy is used."""
        layers = {"layers": [asdict(layer) for layer in LAYERS], "seeds": SEEDS}
        return [
            Cell(variant, {"recipe": recipe_to_dict(recipe)} | layers, partial(measure, variant))
            for variant, recipe in recipes().items()
        ]

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        write_csv(out / f"{self.name}.csv", [row for result in results.values() for row in _rows(result)])
        lines = [[r["label"], *(f"{mean(errors):.4f}" for errors in r["nmse"])] for r in results.values()]
        table = markdown_table(["variant", *(layer.label for layer in LAYERS)], lines)
        published = {layers.policy: layers.layers for layers in published_layers()}
        parts = [
            f"# {self.name}\n\n{self.summary}\n\n![{self.name}]({self.name}.svg)\n",
            _ordering(results),
            f"## Every variant\n\n{table}",
            f"## Published, not measured here\n\n{ordering_table(published)}",
            *(layers.table().markdown() for layers in published_layers()),
        ]
        write_text(out / f"{self.name}.md", "\n".join(parts))
        self._plot(results, out / f"{self.name}.svg")

    def _plot(self, results: Mapping[str, Result], path: Path) -> None:
        with figure(path, 9.4, 5.0) as drawn:
            panels = drawn.subplots(1, 2, sharex=True, sharey=True)
            for axes, labels, what in zip(
                panels, (ROTATIONS, METHODS), ("RTN by rotation", "by method"), strict=True
            ):
                rows = [row for variant in labels if variant in results for row in _rows(results[variant])]
                plot_by_kind(axes, rows, "nmse", labels)
                handles = legend_handles(labels.values())
                axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
                axes.set_xlabel(f"normalized output error at W4A4, {what}")


def svd_hurts_outliers(layers: Sequence[RotatedLayer]) -> bool:
    worst = max(_language(layers, "down_proj"), key=lambda layer: layer.channel_ratio)
    return worst.nmse[1] > worst.nmse[0]


def hadamard_mends_svd(layers: Sequence[RotatedLayer]) -> bool:
    return all(layer.nmse[2] < layer.nmse[1] for layer in layers)


def both_help_queries(layers: Sequence[RotatedLayer]) -> bool:
    return all(layer.nmse[2] < layer.nmse[0] for layer in layers if "q_proj" in layer.layer)


def queries_gain_most(layers: Sequence[RotatedLayer]) -> bool:
    return "q_proj" in max(_language(layers, ""), key=lambda layer: layer.nmse[0] / layer.nmse[2]).layer


ORDERINGS: dict[str, Callable[[Sequence[RotatedLayer]], bool]] = {
    "SVD alone is worse than no rotation at the language down_proj with the largest outliers": svd_hurts_outliers,
    "SVD·H is better than SVD alone at every layer": hadamard_mends_svd,
    "SVD·H is better than no rotation at every q_proj": both_help_queries,
    "of the language layers SVD·H divides the error of a q_proj by most": queries_gain_most,
}
"""What the published layers show, and whether it holds for layers under no rotation, SVD and SVD·H."""


def ordering_table(found: Mapping[str, Sequence[RotatedLayer]]) -> str:
    """Whether each of the orderings holds, by the name of the layers."""
    lines = [
        [what, *("yes" if holds(layers) else "no" for layers in found.values())] for what, holds in ORDERINGS.items()
    ]
    return markdown_table(["ordering", *found], lines)


def rotated(results: Mapping[str, Result]) -> list[RotatedLayer]:
    """The synthetic layers under each of the published rotations. Raises `KeyError` if one was not measured."""
    errors = [results[f"rtn-{key}"]["nmse"] for key in PUBLISHED_ROTATIONS]
    return [
        RotatedLayer(layer.label, layer.ratio, tuple(mean(found[index]) for found in errors))
        for index, layer in enumerate(LAYERS)
    ]


def _ordering(results: Mapping[str, Result]) -> str:
    """Two sentences and the table of orderings."""
    if not {f"rtn-{key}" for key in PUBLISHED_ROTATIONS} <= results.keys():
        return "Some rotations are missing.\n"
    layers = rotated(results)
    worst = max(_language(layers, "down_proj"), key=lambda layer: layer.channel_ratio)
    queries = _language(layers, "q_proj")[0]
    return (
        f"With RTN under no rotation, SVD and SVD·H the error of {worst.layer} is {_three(worst)}, that of "
        f"{queries.layer} {_three(queries)}. Of {len(ORDERINGS)} orderings of the published layers "
        f"{sum(holds(layers) for holds in ORDERINGS.values())} hold here.\n\n{ordering_table({'here': layers})}"
    )


def _language(layers: Sequence[RotatedLayer], kind: str) -> list[RotatedLayer]:
    return [layer for layer in layers if layer.layer.startswith("language") and kind in layer.layer]


def _three(layer: RotatedLayer) -> str:
    return ", ".join(f"{error:.4f}" for error in layer.nmse)


def _rows(result: Result) -> list[dict[str, Any]]:
    """One line per layer and seed."""
    return [
        {"variant": result["variant"], "part": layer.part, "kind": f"{layer.kind}, {layer.ratio:,.0f}x"}
        | {"seed": seed, "nmse": error}
        for layer, errors in zip(LAYERS, result["nmse"], strict=True)
        for seed, error in zip(SEEDS, errors, strict=True)
    ]


STUDY = SyntheticLayers()
