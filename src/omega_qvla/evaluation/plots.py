"""The report's plots, as SVG text that takes its text colour from the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from omega_qvla.evaluation.layer_error import LayerError
from omega_qvla.evaluation.results import Evaluation, PolicyResult

_INK = "#010203"
"""Stands for the page's text colour in the SVG until `_svg` replaces it."""
_REFERENCE = "#8a8a8a"
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#9467bd", "#8c564b")
"""Okabe and Ito's colours, told apart by colour-blind readers, and two more."""
_PART_COLOURS = {"vision": "#cc79a7", "language": "#56b4e9", "action": "#e69f00"}
_OTHER_PART = "#bfc3c8"
_TRACED_DIMENSIONS = 8
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "omega-qvla",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _REFERENCE,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
}


def policy_colours(evaluation: Evaluation) -> list[str]:
    """One colour per policy; grey is the reference."""
    return [_REFERENCE] + [_PALETTE[number % len(_PALETTE)] for number in range(len(evaluation.policies) - 1)]


def success_plot(evaluation: Evaluation) -> str:
    """Success rate of every policy on every task, with Wilson intervals, as SVG."""
    policies, tasks = evaluation.policies, evaluation.tasks
    height = 0.8 / len(policies)
    size = (8.6, 0.9 + len(tasks) * max(0.32, 0.115 * len(policies)))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for number, (policy, colour) in enumerate(zip(policies, policy_colours(evaluation), strict=True)):
            rows = [row + (number - (len(policies) - 1) / 2) * height for row in range(len(tasks))]
            _bars(axes, policy, tasks, rows, 0.86 * height, colour)
        axes.set_yticks(range(len(tasks)), [task.removesuffix("-v3") for task in tasks])
        axes.set_ylim(len(tasks) - 0.45, -0.55)
        axes.set_xlim(0, 100)
        axes.set_xlabel("success rate, % (line: 95 % Wilson interval)")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper left", ncols=4)
        return _svg(figure, "Success rate per task and policy")


def error_plot(evaluation: Evaluation) -> str:
    """Normalized MSE of every quantized policy's actions and of each dimension, as SVG."""
    pairs = _measured(evaluation)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 0.9 + 0.36 * len(pairs)), layout="constrained")
        axes = figure.subplots()
        for row, (policy, colour) in enumerate(pairs):
            assert policy.fidelity is not None
            values = [value for value in policy.fidelity.normalized_mse_per_dimension if value]
            axes.plot(values, [row] * len(values), "o", ms=5, mfc="none", color=colour)
            if policy.fidelity.normalized_mse > 0:
                axes.plot(policy.fidelity.normalized_mse, row, "d", ms=8, color=colour)
        axes.set_xscale("log")
        axes.set_xlim(_decades(axes.get_xlim()))
        axes.set_yticks(range(len(pairs)), [policy.label for policy, _ in pairs])
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.set_xlabel("normalized MSE of actions (diamond: mean; circles: one action dimension each)")
        axes.grid(axis="x")
        return _svg(figure, "Action error per policy")


def step_plot(evaluation: Evaluation) -> str:
    """Normalized MSE of the partly denoised chunk after each denoising step, as SVG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 3.1), layout="constrained")
        axes = figure.subplots()
        steps = 0
        for policy, colour in _measured(evaluation):
            assert policy.fidelity is not None
            values = policy.fidelity.normalized_mse_per_step
            steps = max(steps, len(values))
            points = [(step, value) for step, value in enumerate(values, start=1) if value]
            axes.plot([p[0] for p in points], [p[1] for p in points], "o-", ms=4, color=colour, label=policy.label)
        axes.set_yscale("log")
        axes.set_ylim(_decades(axes.get_ylim()))
        axes.set_xticks(range(1, steps + 1))
        axes.set_xlabel("denoising step")
        axes.set_ylabel("normalized MSE")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=4)
        return _svg(figure, "Error after each denoising step")


def trace_plot(evaluation: Evaluation) -> str:
    """Executed actions of every policy along the traced episodes, a row per action dimension, as SVG."""
    traces, dimensions = evaluation.traces, traced_dimensions(evaluation)
    policies = list(zip(evaluation.policies, policy_colours(evaluation), strict=True))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 0.9 + 1.25 * len(dimensions)), layout="constrained")
        grid = figure.subplots(len(dimensions), len(traces), sharex="col", sharey="row", squeeze=False)
        for column, trace in zip(grid.T, traces, strict=True):
            column[0].set_title(f"{trace.task.removesuffix('-v3')}, seed {trace.seed}", fontsize=9.5)
            column[-1].set_xlabel("step of the episode")
            for (policy, colour), chunks in zip(policies, trace.actions.values(), strict=True):
                steps, values = _broken_line(trace.starts, np.asarray(chunks))
                thick: dict[str, Any] = (
                    {"lw": 3.2, "alpha": 0.55} if policy is evaluation.reference() else {"lw": 1.1}
                )
                for axes, dimension in zip(column, dimensions, strict=True):
                    axes.plot(steps, values[:, dimension], color=colour, label=policy.label, **thick)
        for axes, dimension in zip(grid[:, 0], dimensions, strict=True):
            axes.set_ylabel(f"action {dimension + 1}")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return _svg(figure, "Actions along an episode of the reference")


def traced_dimensions(evaluation: Evaluation) -> list[int]:
    """The action dimensions that are plotted: those in which policies deviate most, if there are many."""
    chunks = [np.asarray(list(trace.actions.values())) for trace in evaluation.traces]
    error = np.sum([np.square(found[1:] - found[:1]).sum(axis=(0, 1, 2)) for found in chunks], axis=0)
    return sorted(np.argsort(-error, kind="stable")[:_TRACED_DIMENSIONS].tolist())


def layer_plot(evaluation: Evaluation) -> str:
    """Error of every quantized linear by kind and policy, as SVG."""
    measured = [pair for pair in zip(evaluation.policies, policy_colours(evaluation), strict=True) if pair[0].layers]
    kinds = list(dict.fromkeys(_kind(layer) for policy, _ in measured for layer in policy.layers))
    size = (8.6, 1.0 + len(kinds) * max(0.26, 0.11 * len(measured)))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for number, (policy, colour) in enumerate(measured):
            shift = 0.8 * ((number + 0.5) / len(measured) - 0.5)
            for row, kind in enumerate(kinds):
                errors = [layer.normalized_mse for layer in policy.layers if _kind(layer) == kind]
                axes.plot(errors, [row + shift] * len(errors), ".", ms=5.5, alpha=0.6, color=colour, mew=0)
                if errors:
                    axes.plot(median(errors), row + shift, "d", ms=5.5, color=colour)
            axes.plot([], [], "d", ms=5.5, color=colour, label=policy.label)
        for row in range(1, len(kinds)):
            axes.axhline(row - 0.5, color=_REFERENCE, alpha=0.35, lw=0.5)
        axes.set_xscale("log")
        axes.set_xlim(_decades(axes.get_xlim()))
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("normalized MSE of the output (diamond: median; dots: one layer each)")
        axes.grid(axis="x")
        figure.legend(loc="outside upper left", ncols=4)
        return _svg(figure, "Error of quantized linears")


def byte_plot(evaluation: Evaluation) -> str:
    """Bytes on disk of every policy by part, as SVG."""
    counted = [policy for policy in evaluation.policies if policy.bytes_by_part]
    parts = list(dict.fromkeys(part for policy in counted for part in policy.bytes_by_part or ()))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 0.9 + 0.36 * len(counted)), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(counted))
        for part in parts:
            sizes = np.array([(policy.bytes_by_part or {}).get(part, 0) / 1e6 for policy in counted])
            colour = _PART_COLOURS.get(part, _OTHER_PART)
            axes.barh(range(len(counted)), sizes, 0.62, left=left, color=colour, label=part)
            left += sizes
        axes.set_yticks(range(len(counted)), [policy.label for policy in counted])
        axes.set_ylim(len(counted) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("MB on disk")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper left", ncols=4)
        return _svg(figure, "Bytes on disk by part")


def _kind(layer: LayerError) -> str:
    return f"{layer.part} {layer.name.rpartition('.')[2]}"


def _broken_line(starts: Sequence[int], chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps [points] and actions [points, dimension] of chunks [chunk, step, dimension], with gaps where observations
    were left out."""
    steps: list[float] = []
    values: list[np.ndarray] = []
    for start, chunk in zip(starts, chunks, strict=True):
        if steps and start > steps[-1] + 1:
            steps.append(math.nan)
            values.append(np.full(chunk.shape[-1], math.nan))
        steps += range(start, start + len(chunk))
        values += list(chunk)
    return np.array(steps), np.stack(values)


def _bars(
    axes: Axes, policy: PolicyResult, tasks: Sequence[str], rows: Sequence[float], height: float, colour: str
) -> None:
    rates = [policy.success(task) for task in tasks]
    axes.barh(rows, [100 * rate.rate for rate in rates], height, color=colour, label=policy.label)
    axes.hlines(rows, [100 * r.low for r in rates], [100 * r.high for r in rates], color=_INK, lw=0.8)


def _decades(limits: tuple[float, float]) -> tuple[float, float]:
    """Limits of a logarithmic axis widened to whole decades, so that small differences look small."""
    return 10.0 ** math.floor(math.log10(limits[0])), 10.0 ** math.ceil(math.log10(limits[1]))


def _measured(evaluation: Evaluation) -> list[tuple[PolicyResult, str]]:
    pairs = zip(evaluation.policies, policy_colours(evaluation), strict=True)
    return [(policy, colour) for policy, colour in pairs if policy.fidelity is not None]


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element that names no outside address and is as wide as its place."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)  # HTML knows the SVG namespace by itself
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: (\S+) [^;\"]*;", r"font-size: \1;", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
