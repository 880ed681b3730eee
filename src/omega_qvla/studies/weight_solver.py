"""What rounding the weights alone does to the output of every layer, by solver (Ω-QVLA Figure 5, Appendix A.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from omega_qvla.evaluation.results import write_text
from omega_qvla.spec import Recipe, read_recipe, with_settings
from omega_qvla.studies.cells import recipe_cells
from omega_qvla.studies.layers import Row, by_kind, layer_rows, legend_handles, mean_table, part_mean, plot_by_kind
from omega_qvla.studies.published import PublishedTable
from omega_qvla.studies.rendering import figure, markdown_table, write_csv
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.workbench import layer_records, open_workbench


@dataclass(frozen=True)
class Solver:
    """A way to round weights."""

    label: str
    settings: tuple[str, ...]
    """Of `omega-qvla`."""


SOLVERS = {
    "rtn-unrotated": Solver(
        "RTN, no rotation",
        ("weight.rounding=rtn", "transform.rotation=none", "transform.permutation=none"),
    ),
    "rtn": Solver("SVD·H, RTN", ("weight.rounding=rtn",)),
    "rtn-groups": Solver(
        "SVD·H, RTN in groups of 64, scales by MSE",
        ("weight.rounding=rtn", "weight.group_size=64", "weight.scale_search=mse"),
    ),
    "gptq": Solver("SVD·H, GPTQ", ("weight.rounding=gptq",)),
    "gptq-blockwise": Solver(
        "SVD·H, GPTQ as released (per 128 columns)",
        (
            "weight.group_size=128",
            "weight.scale_search=mse_coarse",
            "weight.rounding=gptq_blockwise",
            "weight.damping=0.05",
        ),
    ),
}

PUBLISHED = PublishedTable(
    "Ω-QVLA, Appendix A.4; its Figure 5 has no numbers",
    "relative output error of pi0.5 and GR00T N1.5",
    ("what", "relative output error"),
    (
        ("SVD·H, GPTQ against SVD·H, RTN", "40 to 50 % lower on average; lower for each of 16 kinds of layer"),
        ("language, after SVD·H", "0.07 to 0.13; down_proj of GR00T N1.5 above 0.10"),
        ("action, SVD·H, RTN", "0.04 to 0.07 for most layers"),
    ),
)


def recipe(solver: Solver) -> Recipe:
    """`omega-qvla` with this solver in both parts, activations in floating point."""
    return with_settings(read_recipe("omega-qvla"), ["activation.bits=16", *solver.settings], solver.label)


def measure(source: str, checkpoint: Path, variant: str) -> Result:
    """Relative output error ‖XWᵀ − XŴᵀ‖_F / ‖XWᵀ‖_F of every layer on held-out inputs (Figure 5)."""
    bench = open_workbench(checkpoint)
    records = layer_records(bench, bench.output_errors(bench.quantize(recipe(SOLVERS[variant]))))
    layers = [record | {"relative_error": record["nmse"] ** 0.5} for record in records]
    return {"source": source, "variant": variant, "layers": layers}


@dataclass(frozen=True)
class WeightSolver:
    """See `omega_qvla.studies.study.Study`."""

    name: str = "weight-solver"
    summary: str = "Relative output error of every layer when only its weights are rounded, by solver."
    published: str = "Ω-QVLA Figure 5 and Appendix A.4"

    def cells(self, options: Options) -> list[Cell]:
        recipes = {variant: recipe(solver) for variant, solver in SOLVERS.items()}
        return recipe_cells(options, recipes, measure)

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        sources = layer_rows(results.values())
        write_csv(out / f"{self.name}.csv", [row for rows in sources.values() for row in rows])
        write_text(out / f"{self.name}.md", self._page(sources))
        with figure(out / f"{self.name}.svg", 9.4, 6.4) as drawn:
            panels = drawn.subplots(1, len(sources), sharey=True, squeeze=False)[0]
            for axes, (source, rows) in zip(panels, sources.items(), strict=True):
                plot_by_kind(axes, rows, "relative_error", SOLVERS)
                axes.set_title(source)
                axes.set_xlabel("relative output error (small dots: single layers)")
            handles = legend_handles(solver.label for solver in SOLVERS.values())
            drawn.legend(handles=handles, loc="outside upper left", ncols=3)

    def _page(self, sources: Mapping[str, Sequence[Row]]) -> str:
        parts = [f"# {self.name}\n\n{self.summary}\n\n![{self.name}]({self.name}.svg)\n"]
        columns = ["mean over layers", *(solver.label for solver in SOLVERS.values())]
        for source, rows in sources.items():
            table = markdown_table(columns, mean_table(rows, "relative_error", SOLVERS))
            parts.append(f"## {source}\n\n{seen(rows)}\n\n{table}")
        parts.append(f"## Published, not measured here\n\n{PUBLISHED.markdown()}")
        return "\n".join(parts)


def seen(rows: Sequence[Row]) -> str:
    """Two sentences about one source: what each solver changes, and where the error stays largest."""
    if {row["variant"] for row in rows} != set(SOLVERS):
        return "Some solvers are missing."
    changes = [f"{SOLVERS[variant].label} {_change(rows, variant)}" for variant in SOLVERS if variant != "rtn"]
    kinds = {kind: mean(found["gptq"]) for kind, found in by_kind(rows, "relative_error").items()}
    worst, best = max(kinds, key=kinds.__getitem__), min(kinds, key=kinds.__getitem__)
    return (
        f"Relative output error against SVD·H, RTN, in language and action: {'; '.join(changes)}. "
        f"Under SVD·H, GPTQ it is largest for {worst} ({kinds[worst]:.3f}) and smallest for {best} "
        f"({kinds[best]:.3f})."
    )


def _change(rows: Sequence[Row], variant: str) -> str:
    def change(part: str) -> float:
        return part_mean(rows, "relative_error", variant, part) / part_mean(rows, "relative_error", "rtn", part) - 1

    return f"{change('language'):+.0%} and {change('action'):+.0%}"


STUDY = WeightSolver()
