"""An evaluation as a table for the terminal, as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment as Templates
from jinja2 import PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from omega_qvla.evaluation import plots
from omega_qvla.evaluation.recording import FrameStrip
from omega_qvla.evaluation.results import NOT_INSTALLED, Evaluation, PolicyResult, write_text
from omega_qvla.evaluation.statistics import SuccessRate

HEADLINE_COLUMNS = (
    "policy",
    "execution",
    "success",
    "95 % interval",
    "difference",
    "wins–losses",
    "p",
    "action nMSE",
    "steps",
    "MB on disk",
    "p50 / p95 ms",
)
_NOTHING = "–"
EXPLANATIONS = (
    "`simulated` means that floating-point arithmetic imitates the integers: the accuracy is that of the "
    "low-bit format, the memory and the time are not. `integer` means that weights are stored and products "
    "are executed at that width. `float` is not quantized.",
    "Success is the share of solved episodes with its 95 % Wilson interval. The difference to the reference "
    "(the first policy) is in percentage points with Newcombe's 95 % interval for paired proportions. Wins "
    "are episodes that the policy solves and the reference does not; p is McNemar's exact two-sided value.",
    "Action nMSE is the squared action error against the reference on held-out observations under the same "
    "noise, divided by the spread of the reference's actions, mean over action dimensions: 0 is equality, 1 "
    "is no better than a constant action. Steps is the mean length of solved episodes. MB is 10^6 bytes. "
    "Milliseconds are of one inference with a batch of one on the machine named below; they compare these "
    "policies here and claim nothing about other machines.",
)


@dataclass(frozen=True)
class ShownStrip:
    """A frame strip with the words for it."""

    strip: FrameStrip
    outcome: str


def headline_row(evaluation: Evaluation, policy: PolicyResult) -> tuple[str, ...]:
    """One policy's cells for `HEADLINE_COLUMNS`."""
    rate = policy.success()
    return (
        policy.label,
        policy.execution,
        f"{100 * rate.rate:.1f} % ({rate.successes}/{rate.episodes})",
        _interval(rate),
        *_paired_cells(evaluation, policy),
        _NOTHING if policy.fidelity is None else f"{policy.fidelity.normalized_mse:.2e}",
        _number(policy.mean_steps(), ".1f"),
        _NOTHING if policy.bytes_on_disk is None else f"{policy.bytes_on_disk / 1e6:.1f}",
        _NOTHING if policy.latency is None else f"{policy.latency.p50_ms:.1f} / {policy.latency.p95_ms:.1f}",
    )


def task_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Per task its name and each policy's success with its interval, in percent."""
    return [(task, *(_short(policy.success(task)) for policy in evaluation.policies)) for task in evaluation.tasks]


def table(evaluation: Evaluation, width: int = 160) -> str:
    """The headline table for a terminal of `width` columns, plain text without colours."""
    shown = Table(title=_title(evaluation), title_justify="left")
    for number, column in enumerate(HEADLINE_COLUMNS):
        shown.add_column(column, justify="left" if number < 2 else "right")
    for policy in evaluation.policies:
        shown.add_row(*headline_row(evaluation, policy))
    console = Console(file=io.StringIO(), width=width, no_color=True)
    with console.capture() as capture:
        console.print(shown, markup=False)
    return capture.get()


def markdown(evaluation: Evaluation) -> str:
    """Headline table, explanations, per-task table and where it ran, as Markdown."""
    headline = [headline_row(evaluation, policy) for policy in evaluation.policies]
    labels = tuple(policy.label for policy in evaluation.policies)
    parts = [
        f"# {_title(evaluation)}",
        _markdown_table(HEADLINE_COLUMNS, headline),
        *EXPLANATIONS,
        "## Success per task, % with 95 % interval",
        _markdown_table(("task", *labels), task_rows(evaluation)),
        "## Where and how",
        "\n".join(f"- {name}: {value}" for name, value in circumstances(evaluation)),
    ]
    return "\n\n".join(parts) + "\n"


def html(evaluation: Evaluation) -> str:
    """One page with tables, plots and frames; it loads nothing from anywhere."""
    templates = Templates(
        loader=PackageLoader("omega_qvla.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measured = any(policy.fidelity is not None for policy in evaluation.policies)
    sizes = byte_rows(evaluation)
    return templates.get_template("report.html.jinja").render(
        title=_title(evaluation),
        evaluation=evaluation,
        columns=HEADLINE_COLUMNS,
        rows=[headline_row(evaluation, policy) for policy in evaluation.policies],
        colours=plots.policy_colours(evaluation),
        explanations=EXPLANATIONS,
        task_rows=task_rows(evaluation),
        success_plot=plots.success_plot(evaluation),
        error_plot=plots.error_plot(evaluation) if measured else None,
        step_plot=plots.step_plot(evaluation) if measured else None,
        trace_plot=plots.trace_plot(evaluation) if evaluation.traces else None,
        layer_plot=plots.layer_plot(evaluation) if any(policy.layers for policy in evaluation.policies) else None,
        layer_rows=layer_rows(evaluation),
        byte_plot=plots.byte_plot(evaluation) if sizes else None,
        byte_rows=sizes,
        latency_rows=latency_rows(evaluation),
        strips={task: strips for task in evaluation.tasks if (strips := choose_strips(evaluation, task))},
        circumstances=circumstances(evaluation),
    )


def write_report(evaluation: Evaluation, directory: Path) -> tuple[Path, Path]:
    """Write `report.md` and `report.html` into the directory; returns their paths."""
    paths = directory / "report.md", directory / "report.html"
    write_text(paths[0], markdown(evaluation))
    write_text(paths[1], html(evaluation))
    return paths


def layer_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Per policy whose layers were measured: its name, how many, median, 95th percentile, and the worst of them."""
    rows: list[tuple[str, ...]] = []
    for policy in evaluation.policies:
        if policy.layers:
            errors = [layer.normalized_mse for layer in policy.layers]
            worst = max(policy.layers, key=lambda layer: layer.normalized_mse)
            figures = (*np.percentile(errors, [50, 95]), worst.normalized_mse)
            rows.append((policy.label, str(len(errors)), *(f"{value:.2e}" for value in figures), worst.name))
    return rows


def byte_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Columns, then per policy whose bytes were counted its name, MB of each part, and their sum; or nothing."""
    counted = {policy.label: policy.bytes_by_part for policy in evaluation.policies if policy.bytes_by_part}
    parts = tuple(dict.fromkeys(part for sizes in counted.values() for part in sizes))
    rows: list[tuple[str, ...]] = [("policy", *parts, "all files")] if counted else []
    for label, sizes in counted.items():
        megabytes = [_number(sizes[part] / 1e6 if part in sizes else None, ".2f") for part in parts]
        rows.append((label, *megabytes, f"{sum(sizes.values()) / 1e6:.2f}"))
    return rows


def latency_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Per policy whose latency was measured: its name, milliseconds, repeats and threads."""
    rows: list[tuple[str, ...]] = []
    for policy in evaluation.policies:
        if (found := policy.latency) is not None:
            times = (found.p50_ms, found.p95_ms, found.minimum_ms, found.maximum_ms, found.spread_ms)
            rows.append((policy.label, *(f"{value:.1f}" for value in times), str(found.repeats), str(found.threads)))
    return rows


def choose_strips(evaluation: Evaluation, task: str) -> list[ShownStrip]:
    """One success and one failure of the task where there are any, of the last policy that has one."""
    last = {policy.label: number for number, policy in enumerate(evaluation.policies)}
    strips = sorted(
        (strip for strip in evaluation.strips if strip.task == task), key=lambda strip: -last[strip.label]
    )
    chosen = []
    for success, outcome in ((True, "solved"), (False, "not solved")):
        found = next((strip for strip in strips if strip.success == success), None)
        if found is not None:
            chosen.append(ShownStrip(found, outcome))
    return chosen


def circumstances(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What one needs to repeat the evaluation, name and value."""
    machine, seeds = evaluation.machine, evaluation.seeds
    held_out = evaluation.fidelity_seeds
    execute = sorted({policy.execute_steps for policy in evaluation.policies})
    rows = [
        ("benchmark", evaluation.benchmark),
        *((name, str(value)) for name, value in evaluation.conditions.items()),
        ("evaluation seeds", f"{seeds[0]} to {seeds[-1]} on each of {len(evaluation.tasks)} tasks"),
        ("held-out observations", f"seeds {held_out[0]} to {held_out[-1]}" if held_out else "none"),
        ("step limit", str(evaluation.max_steps)),
        ("actions executed per inference", ", ".join(map(str, execute))),
        ("robots in lockstep", str(evaluation.lanes)),
        ("Python", machine.python),
        *((name, version) for name, version in machine.packages.items() if version != NOT_INSTALLED),
        ("processor", machine.cpu),
        ("system", machine.platform),
        ("finished", machine.created),
        *((task, f"“{sentence}”") for task, sentence in evaluation.instructions.items()),
    ]
    threads = {policy.latency.threads for policy in evaluation.policies if policy.latency is not None}
    return [*rows, ("threads for latency", ", ".join(map(str, sorted(threads))))] if threads else rows


def _paired_cells(evaluation: Evaluation, policy: PolicyResult) -> tuple[str, str, str]:
    if policy is evaluation.reference():
        return "reference", _NOTHING, _NOTHING
    paired = evaluation.paired(policy)
    difference = f"{paired.difference:+.1f} [{paired.low:+.1f}, {paired.high:+.1f}]"
    p_value = "< 0.001" if paired.p_value < 0.001 else f"{paired.p_value:.3f}"
    return difference, f"{paired.wins}–{paired.losses}", p_value


def _title(evaluation: Evaluation) -> str:
    episodes = len(evaluation.tasks) * len(evaluation.seeds)
    return f"{len(evaluation.policies)} policies on {episodes} episodes of {len(evaluation.tasks)} tasks"


def _interval(rate: SuccessRate) -> str:
    return f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _short(rate: SuccessRate) -> str:
    return f"{100 * rate.rate:.0f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def _number(value: float | None, form: str) -> str:
    return _NOTHING if value is None else format(value, form)


def _markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
