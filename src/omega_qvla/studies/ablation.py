"""Which piece of a recipe does what: Ω-QVLA's Table 4 in full, and one-line changes of the recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from matplotlib.axes import Axes

from omega_qvla.evaluation.results import write_text
from omega_qvla.spec import read_recipe, with_settings
from omega_qvla.studies.comparison import Judged, compare_with_full_precision, csv_row, explanation, table
from omega_qvla.studies.published import published_section
from omega_qvla.studies.rendering import COLOURS, MARKERS, NOTHING, figure, markdown_table, write_csv
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.sweep import FULL_PRECISION, Variant, full_precision, variant_cell

EPISODES = 20
"""Per task, of the variants that Table 4 has."""


@dataclass(frozen=True)
class Piece:
    """A choice of the method that is ablated."""

    key: str
    label: str
    setting: str


ROTATIONS = (
    Piece("none", "none", "transform.rotation=none"),
    Piece("svd", "SVD", "transform.rotation=svd"),
    Piece("h", "H", "transform.rotation=hadamard"),
    Piece("svd-h", "SVD·H", "transform.rotation=svd_hadamard"),
)
STEPS = (
    Piece("ps", "+ PS", "action.activation.mode=per_step"),
    Piece("no-ps", "− PS", "action.activation.mode=static"),
)
SOLVERS = (
    Piece("rtn", "RTN head", "action.weight.rounding=rtn"),
    Piece("gptq", "GPTQ head", "action.weight.rounding=gptq"),
)


@dataclass(frozen=True)
class Change:
    """A recipe with settings replaced."""

    key: str
    label: str
    recipe: str
    settings: tuple[str, ...]
    in_table_4: bool = False
    """Whether the paper ran it in closed loop; then so do we."""

    def variant(self, episodes: int) -> Variant:
        """Raises `RecipeError` for a recipe or setting that does not exist."""
        recipe = with_settings(read_recipe(self.recipe), self.settings, self.label)
        return Variant(self.key, self.label, recipe, episodes if self.in_table_4 else 0, layers=True)


def _combination(rotation: Piece, steps: Piece, solver: Piece) -> Change:
    pieces = rotation, steps, solver
    key = "-".join(["omega-qvla", *(piece.key for piece in pieces)])
    label = f"{rotation.label} {steps.label}, {solver.label}"
    published = (rotation.key, steps.key) in {("svd", "ps"), ("svd-h", "no-ps"), ("svd-h", "ps")}
    settings = tuple(piece.setting for piece in pieces)
    return Change(key, label, "omega-qvla", settings, published and solver.key == "rtn")


COMBINATIONS = {pieces: _combination(*pieces) for pieces in product(ROTATIONS, STEPS, SOLVERS)}
"""`omega-qvla` with every choice of the three pieces; GPTQ for language in all of them, as in Table 4."""

_TOKEN = ("activation.granularity=token", "activation.group_size=null")
_FOLDED = (
    "action.transform.folded_percentile=99.9",
    "action.activation.granularity=tensor",
    "action.activation.mode=per_step",
    "action.activation.group_size=null",
)
_GROUPS = ("weight.group_size=64", "activation.granularity=token_group", "activation.group_size=64")
CHANGES = (
    Change("rtn", "rtn", "rtn", ()),
    Change("rtn-groups", "rtn: groups of 64", "rtn", _GROUPS),
    Change("omega-qvla-site", "omega-qvla: one transform per site", "omega-qvla", ("transform.sharing=site",)),
    Change("omega-qvla-rtn", "omega-qvla: RTN on both", "omega-qvla", ("weight.rounding=rtn",)),
    Change("omega-int4", "omega-int4", "omega-int4", ()),
    Change("omega-int4-none", "omega-int4: rotation none", "omega-int4", ("transform.rotation=none",)),
    Change("omega-int4-svd", "omega-int4: rotation SVD", "omega-int4", ("transform.rotation=svd",)),
    Change("omega-int4-svd-h", "omega-int4: rotation SVD·H", "omega-int4", ("transform.rotation=svd_hadamard",)),
    Change("omega-int4-unsmoothed", "omega-int4: no smoothing", "omega-int4", ("transform.smoothing=null",)),
    Change(
        "omega-int4-unsmoothed-svd-h",
        "omega-int4: no smoothing, SVD·H",
        "omega-int4",
        ("transform.smoothing=null", "transform.rotation=svd_hadamard"),
    ),
    Change("omega-int4-unpermuted", "omega-int4: no permutation", "omega-int4", ("transform.permutation=none",)),
    Change("omega-int4-rtn", "omega-int4: RTN on both", "omega-int4", ("weight.rounding=rtn",)),
    Change("omega-int4-gptq", "omega-int4: GPTQ on both", "omega-int4", ("weight.rounding=gptq",)),
    Change("omega-int4-peak", "omega-int4: peak scales", "omega-int4", ("weight.scale_search=max",)),
    Change("omega-int4-token", "omega-int4: one scale per token, groups for weights", "omega-int4", _TOKEN),
    Change(
        "omega-int4-channel",
        "omega-int4: one scale per token and output channel",
        "omega-int4",
        ("weight.group_size=null", *_TOKEN),
    ),
    Change("omega-int4-folded", "omega-int4: folded d[j] and a[t] on action", "omega-int4", _FOLDED),
)
"""The recipes and one-line changes of them."""
VARIANTS = (*COMBINATIONS.values(), *CHANGES)


@dataclass(frozen=True)
class Ablation:
    """See `omega_qvla.studies.study.Study`."""

    name: str = "ablation"
    summary: str = "What rotation, scales per denoising step, solver and every other piece contribute"
    published: str = "Ω-QVLA Table 4"

    def cells(self, options: Options) -> list[Cell]:
        """Full precision and Table 4's variants, then the other combinations, then the one-line changes."""
        episodes = EPISODES if options.episodes is None else options.episodes
        changes = sorted(VARIANTS, key=lambda change: not change.in_table_4)
        variants = [full_precision(episodes), *(change.variant(episodes) for change in changes)]
        return [variant_cell(options, source, variant) for variant in variants for source in options.sources]

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        """Closed loop where there is one, action errors of the sources side by side, layer errors of each source."""
        sources = {
            source: compare_with_full_precision(_in_table_order(source, results))
            for source in dict.fromkeys(result["source"] for result in results.values())
        }
        parts = [f"# {self.summary}\n\n![action error by rotation]({self.name}.svg)\n"]
        for source, judged in sources.items():
            ran = {key: found for key, found in judged.items() if found.success is not None}
            if ran:
                heads = {key: (found.result["label"],) for key, found in ran.items()}
                parts.append(f"## Measured in closed loop: {source}\n\n{table(ran, heads, ('variant',))}\n")
                parts.append(explanation(ran))
        parts.append(f"## Measured: action error (normalized MSE)\n\n{_action_table(sources)}")
        for source, judged in sources.items():
            parts.append(f"## Measured: output error of layers (normalized MSE), {source}\n\n{_layer_table(judged)}")
        parts.append(published_section("omega-qvla-table-4"))
        write_text(out / f"{self.name}.md", "\n".join(parts))
        write_csv(out / f"{self.name}.csv", _csv_rows(sources))
        _plot(sources, out / f"{self.name}.svg")


def _in_table_order(source: str, results: Mapping[str, Result]) -> dict[str, Result]:
    """The finished variants of one source, by variant instead of cell."""
    keys = (FULL_PRECISION, *(change.key for change in VARIANTS))
    return {key: results[f"{source}-{key}"] for key in keys if f"{source}-{key}" in results}


def _quantized(judged: Mapping[str, Judged]) -> dict[str, Result]:
    return {key: found.result for key, found in judged.items() if key != FULL_PRECISION}


def _action_table(sources: Mapping[str, Mapping[str, Judged]]) -> str:
    found = {source: _quantized(judged) for source, judged in sources.items()}
    rows = []
    for change in VARIANTS:
        results = [of_source.get(change.key) for of_source in found.values()]
        known = [result for result in results if result is not None]
        if known:
            figures = [NOTHING if result is None else f"{result['action_nmse']:.2e}" for result in results]
            rows.append([change.label, known[0]["execution"], *figures])
    return markdown_table(["variant", "execution", *found], rows)


def _layer_table(judged: Mapping[str, Judged]) -> str:
    results = [*_quantized(judged).values()]
    kinds: Sequence[str] = [*results[0]["layer_nmse"]] if results else []
    rows = [[result["label"], *(f"{result['layer_nmse'][kind]:.4f}" for kind in kinds)] for result in results]
    return markdown_table(["variant", *kinds], rows)


def _csv_rows(sources: Mapping[str, Mapping[str, Judged]]) -> list[dict[str, object]]:
    found = [one for judged in sources.values() for one in judged.values()]
    layers = [one.result.get("layer_nmse", {}) for one in found]
    kinds = dict.fromkeys(kind for errors in layers for kind in errors)
    return [
        csv_row(one) | {f"nmse {kind}": errors.get(kind) for kind in kinds}
        for one, errors in zip(found, layers, strict=True)
    ]


def _plot(sources: Mapping[str, Mapping[str, Judged]], path: Path) -> None:
    """Action error of every combination over the rotation."""
    with figure(path, 4.4 * len(sources), 3.6) as drawn:
        panels = drawn.subplots(1, len(sources), sharey=True, squeeze=False)[0]
        for axes, (source, judged) in zip(panels, sources.items(), strict=True):
            _plot_source(axes, _quantized(judged))
            axes.set_title(source)
        panels[0].set_ylabel("action error (normalized MSE)")
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _plot_source(axes: Axes, results: Mapping[str, Result]) -> None:
    for number, (steps, solver) in enumerate(product(STEPS, SOLVERS)):
        keys = [COMBINATIONS[rotation, steps, solver].key for rotation in ROTATIONS]
        points = [(x, results[key]["action_nmse"]) for x, key in enumerate(keys) if key in results]
        label, colour, marker = f"{steps.label}, {solver.label}", COLOURS[number], MARKERS[number]
        axes.semilogy([x for x, _ in points], [y for _, y in points], color=colour, marker=marker, lw=1, label=label)
    axes.set_xticks(range(len(ROTATIONS)), [rotation.label for rotation in ROTATIONS])
    axes.grid(axis="y")


STUDY = Ablation()
