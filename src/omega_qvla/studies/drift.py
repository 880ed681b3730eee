"""How far the head's inputs drift over the denoising steps, and what one scale for all of them costs (Ω-QVLA Figure
7, Appendix A.6)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from omega_qvla.evaluation.results import write_text
from omega_qvla.numerics.quantizer import percentile
from omega_qvla.spec import Recipe, read_recipe, recipe_to_dict, with_scope, with_settings
from omega_qvla.studies.published import PublishedTable
from omega_qvla.studies.rendering import COLOURS, figure, markdown_table, write_csv
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.sweep import digest
from omega_qvla.studies.workbench import open_workbench

MODES = {"per_step": "a scale per step", "static": "one scale for all steps"}
PERCENTILE = 99.9

PUBLISHED = PublishedTable(
    "Ω-QVLA, Appendix A.6",
    "GR00T N1.5, 8 steps",
    ("input", "q99.9 at the last step against the first", "error of one scale against one per step"),
    (
        ("attention input (q, k, v)", "15 to 20 % lower", "up to 11 % higher"),
        ("attention output, MLP hidden", "5 to 10 % drift", ""),
        ("MLP input", "within 2 %", "essentially equal"),
        ("mean of all", "", "2.5 % higher"),
    ),
)

Line = Mapping[str, Any]
"""One kind of input at one depth and step: `source`, `input`, `depth`, `step`, `magnitude`, `per_step`, `static`."""


def recipe(mode: str) -> Recipe:
    """`omega-qvla` on the head alone with one scale per channel, for each step or for all."""
    return with_settings(with_scope(read_recipe("omega-qvla"), "action"), [f"activation.mode={mode}"], mode)


def magnitude(x: Tensor) -> float:
    """The 99.9th percentile of |x| over all entries of X [tokens, in]."""
    return percentile(x.reshape(-1, 1), PERCENTILE).item()


def measure(source: str, checkpoint: Path) -> Result:
    """Of every input of the head: magnitude by step, relative to the first, and the output error of its linears by
    step under both kinds of scale."""
    bench = open_workbench(checkpoint)
    errors = {mode: bench.output_errors(bench.quantize(recipe(mode))) for mode in MODES}
    inputs = []
    for site in bench.policy.sites():
        if site.part != "action":
            continue
        tokens = bench.inputs[site.linears[0]]
        magnitudes = [magnitude(tokens[step]) for step in range(bench.policy.denoising_steps)]
        found = {mode: _mean_by_step([errors[mode][name].by_step for name in site.linears]) for mode in MODES}
        inputs.append(
            {
                "input": site.name.rpartition(".")[2].replace("_", " ").replace("mlp", "MLP"),
                "depth": bench.layers[site.linears[0]].depth,
                "magnitude": [value / magnitudes[0] for value in magnitudes],
                **found,
            }
        )
    return {"source": source, "inputs": inputs}


@dataclass(frozen=True)
class Drift:
    """See `omega_qvla.studies.study.Study`."""

    name: str = "drift"
    summary: str = (
        "The 99.9th percentile of the head's inputs by denoising step, and the normalized output error at W4A4 "
        "with a scale per channel for each step against one for all steps (the percentile over all of them)."
    )
    published: str = "Ω-QVLA Figure 7"

    def cells(self, options: Options) -> list[Cell]:
        recipes = {mode: recipe_to_dict(recipe(mode)) for mode in MODES}
        return [
            Cell(
                source,
                {"source": source, "checkpoint": digest(checkpoint), "recipes": recipes},
                partial(measure, source, checkpoint),
            )
            for source, checkpoint in options.sources.items()
        ]

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        sources = {result["source"]: _lines(result) for result in results.values()}
        write_csv(out / f"{self.name}.csv", [line for lines in sources.values() for line in lines])
        write_text(out / f"{self.name}.md", self._page(sources))
        with figure(out / f"{self.name}.svg", 9.4, 0.6 + 3.4 * len(sources)) as drawn:
            panels = drawn.subplots(len(sources), 2, sharex=True, squeeze=False)
            for (left, right), (source, lines) in zip(panels, sources.items(), strict=True):
                _plot_magnitudes(left, lines)
                _plot_errors(right, lines)
                left.set_title(f"{source}: q99.9 of |x| against the first step")
                right.set_title(f"{source}: nMSE, one scale for all steps (dashed)")
            drawn.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4)

    def _page(self, sources: Mapping[str, Sequence[Line]]) -> str:
        parts = [f"# {self.name}\n\n{self.summary}\n\n![{self.name}]({self.name}.svg)\n"]
        columns = ("input", "q99.9 at the last step", *(f"nMSE, {label}" for label in MODES.values()), "ratio")
        for source, lines in sources.items():
            table = markdown_table(columns, [_row(lines, kind) for kind in _kinds(lines)])
            parts.append(f"## {source}\n\n{seen(lines)}\n\n{table}")
        parts.append(f"## Published, not measured here\n\n{PUBLISHED.markdown()}")
        return "\n".join(parts)


def seen(lines: Sequence[Line]) -> str:
    """Two sentences about one source: where magnitudes drift, and what one scale costs."""
    ends = {kind: _curve(lines, kind, "magnitude")[-1] - 1 for kind in _kinds(lines)}
    costs = {kind: _cost(lines, kind) - 1 for kind in _kinds(lines)}
    most = max(ends, key=lambda kind: abs(ends[kind]))
    least = min(ends, key=lambda kind: abs(ends[kind]))
    dearest = max(costs, key=costs.__getitem__)
    return (
        f"From the first to the last step the 99.9th percentile of |x| changes most at the {most} "
        f"({ends[most]:+.0%}) and least at the {least} ({ends[least]:+.0%}). One scale for all steps changes the "
        f"output error by {mean(costs.values()):+.1%} on average and most at the {dearest} ({costs[dearest]:+.1%})."
    )


def _mean_by_step(errors: Sequence[Sequence[float]]) -> list[float]:
    return [mean(step) for step in zip(*errors, strict=True)]


def _lines(result: Result) -> list[Line]:
    return [
        {"source": result["source"], "input": found["input"], "depth": found["depth"], "step": step}
        | {key: found[key][step] for key in ("magnitude", *MODES)}
        for found in result["inputs"]
        for step in range(len(found["magnitude"]))
    ]


def _kinds(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line["input"] for line in lines))


def _curve(lines: Sequence[Line], kind: str, value: str) -> list[float]:
    """Mean over the layers of one kind, by step."""
    steps: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        if line["input"] == kind:
            steps[line["step"]].append(line[value])
    return [mean(steps[step]) for step in sorted(steps)]


def _cost(lines: Sequence[Line], kind: str) -> float:
    """Output error with one scale for all steps over that with a scale per step."""
    return mean(_curve(lines, kind, "static")) / mean(_curve(lines, kind, "per_step"))


def _row(lines: Sequence[Line], kind: str) -> list[str]:
    errors = [f"{mean(_curve(lines, kind, mode)):.4f}" for mode in MODES]
    end = _curve(lines, kind, "magnitude")[-1]
    return [kind, f"{end - 1:+.1%}", *errors, f"{_cost(lines, kind):.3f}"]


def _plot_magnitudes(axes: Axes, lines: Sequence[Line]) -> None:
    for colour, kind in zip(COLOURS, _kinds(lines), strict=False):
        for depth in sorted({line["depth"] for line in lines}):
            single = [line for line in lines if line["depth"] == depth]
            axes.plot(_curve(single, kind, "magnitude"), color=colour, lw=0.6, alpha=0.5)
        axes.plot(_curve(lines, kind, "magnitude"), "o-", ms=3, color=colour, label=kind)
    axes.set_xlabel("denoising step (thin lines: single layers)")
    axes.grid(axis="y")


def _plot_errors(axes: Axes, lines: Sequence[Line]) -> None:
    for colour, kind in zip(COLOURS, _kinds(lines), strict=False):
        each, one = _curve(lines, kind, "per_step"), _curve(lines, kind, "static")
        axes.plot(each, "o-", ms=3, color=colour)
        axes.plot(one, "s--", ms=3, color=colour)
        axes.fill_between(range(len(each)), each, one, color=colour, alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("denoising step")
    axes.grid(axis="y")


STUDY = Drift()
