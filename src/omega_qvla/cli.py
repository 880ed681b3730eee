"""The command `omega-qvla`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from omega_qvla import api
from omega_qvla.pack.checkpoint import is_checkpoint
from omega_qvla.pack.inspect import CheckpointReport, inspect, planned_parts
from omega_qvla.pack.manifest import Manifest, Plan
from omega_qvla.spec import (
    Part,
    Recipe,
    read_recipe,
    recipe_names,
    scope_names,
    scope_summary,
    with_scope,
    with_settings,
)

if TYPE_CHECKING:
    from omega_qvla.evaluation.results import Evaluation
    from omega_qvla.quantization.preflight import Preflight

app = typer.Typer(
    help="Quantize Vision-Language-Action policies to 4 bits, run them, and prove that they still work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure how fast quantized linears and policies are.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
_out, _err = Console(), Console(stderr=True)

RECIPE_TABLE_WIDTH = 160
LINEAR_TABLE_WIDTH = 200
"""Layers have long names, and a name cut short names nothing."""
KEPT_MODULES = 5
"""Of what is kept in floating point, those listed: the largest."""
DEFAULT_RECIPE, DEFAULT_SCOPE = "omega-int4", "policy"


class Execution(StrEnum):
    """How linears with executable scales run."""

    integer = "integer"
    simulated = "simulated"


@app.command()
def quantize(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint directory of lerobot, of openpi, or of GR00T N1.5.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name (see `recipes`) or a TOML file.")] = DEFAULT_RECIPE,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace a field of the recipe, such as activation.bits=8. Repeatable."),
    ] = None,
    scope: Annotated[str, typer.Option(help="Which layers (see `scopes`).")] = DEFAULT_SCOPE,
    trajectories: Annotated[
        int, typer.Option(min=1, help="Meta-World episodes of the policy itself to calibrate on.")
    ] = api.CALIBRATION_TRAJECTORIES,
    dataset: Annotated[
        Path | None, typer.Option(help="Calibrate on a local lerobot dataset instead of on rollouts.")
    ] = None,
    observations: Annotated[int, typer.Option(min=1, help="Frames to take from the dataset.")] = 256,
    memory_budget: Annotated[
        str, typer.Option(help="Physical memory to keep to, such as 8GiB; no limit if empty.", metavar="SIZE")
    ] = "",
) -> None:
    """Quantize a policy into a self-contained checkpoint."""
    budget = size_in_bytes(memory_budget) if memory_budget else None
    chosen = with_scope(with_settings(read_recipe(recipe), settings or []), scope)
    with _progress() as on_progress:
        manifest = api.quantize(
            checkpoint,
            chosen,
            out,
            calibration=None if dataset is None else api.calibrate_on_dataset(dataset, observations),
            trajectories=trajectories,
            memory_budget=budget,
            on_preflight=_print_preflight,
            on_progress=on_progress,
        )
    _summarize(out, manifest)


@app.command("inspect")
def inspect_command(
    directory: Annotated[Path, typer.Argument(help="A checkpoint, quantized or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    resident: Annotated[
        bool, typer.Option("--resident", help="Also load it in a new process and measure the memory that this takes.")
    ] = False,
    recipe: Annotated[str, typer.Option(help="For one that is not quantized: what this recipe would do.")] = "",
    scope: Annotated[str, typer.Option(help="For one that is not quantized: which layers (see `scopes`).")] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="For one that is not quantized: replace a field of the recipe.")
    ] = None,
) -> None:
    """List every linear of a checkpoint, what was done to it and why, and the bytes of everything.

    Of a checkpoint in floating point: what a recipe would do to each, without reading its weights.
    """
    if not is_checkpoint(directory):
        if resident:
            raise ValueError(f"{directory} is no quantized checkpoint: --resident measures those")
        chosen = with_settings(read_recipe(recipe or DEFAULT_RECIPE), settings or [])
        chosen = with_scope(chosen, scope or DEFAULT_SCOPE)
        _print_plan(api.plan(directory, chosen), as_json=as_json)
        return
    if recipe or scope or settings:
        raise ValueError(
            f"{directory} is quantized already, its recipe is in it: leave out --recipe, --scope and --set"
        )
    report = inspect(directory)
    memory = api.resident_memory(directory) if resident else None
    if as_json:
        print(json.dumps(asdict(report) | ({} if memory is None else {"resident": asdict(memory)}), indent=1))
        return
    _print_linears(report)
    _print_totals(report)
    if memory is not None:
        _out.print(
            f"loaded and idle it takes {memory.total:,} bytes of memory ({memory.anonymous:,} of its own, "
            f"{memory.file_backed:,} mapped from its files): {memory.total / report.total_bytes:.1%} of its files",
            soft_wrap=True,
        )


@app.command()
def evaluate(
    directories: Annotated[
        list[Path], typer.Argument(help="Policies to compare, quantized or not; the first is the reference.")
    ],
    tasks: Annotated[str, typer.Option(help="Meta-World tasks, separated by commas; all of MT10 if empty.")] = "",
    episodes: Annotated[int, typer.Option(min=1, help="Episodes per task.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="First initial state.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the result does not depend on them.")] = 2,
    execution: Annotated[Execution, typer.Option(help="Arithmetic of executable recipes.")] = Execution.integer,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every episode and figure here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write report.md and report.html into this directory.")] = None,
) -> None:
    """Run policies on the same episodes under the same noise, and compare them."""
    from omega_qvla.evaluation.report import table, write_report
    from omega_qvla.evaluation.results import save

    evaluation = api.evaluate(
        directories,
        tasks=[task.strip() for task in tasks.split(",") if task.strip()] or None,
        episodes_per_task=episodes,
        first_seed=seed,
        execution=execution.value,
        workers=workers,
    )
    print(table(evaluation))
    if json_file is not None:
        save(evaluation, json_file)
    if report is not None:
        write_report(evaluation, report)
        print(f"report: {report / 'report.html'}")


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="A study; without a name they are listed.")] = "",
    out: Annotated[Path, typer.Option(help="Directory for results, and for what is needed to go on.")] = Path(
        "runs/reproduce"
    ),
    tasks: Annotated[str, typer.Option(help="Meta-World tasks, separated by commas; all of MT10 if empty.")] = "",
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes per task instead of the study's own.")] = None,
    only: Annotated[str | None, typer.Option(help="Compute only cells whose key matches this expression.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the result does not depend on them.")] = 2,
) -> None:
    """Rebuild a table or figure of the papers on the bundled policy and its outlier-matched twin.

    A study consists of cells, which are kept as soon as they are computed: the same command goes on after an
    interruption and computes only what is missing.
    """
    from omega_qvla.evaluation.metaworld import TASKS
    from omega_qvla.studies import STUDIES
    from omega_qvla.studies.study import Options, run_study
    from omega_qvla.studies.twin import standard_sources

    if name not in STUDIES:
        if name:
            raise ValueError(f"there is no study {name!r}; there are {', '.join(STUDIES)}")
        table = Table("study", "repeats", "summary")
        for study in STUDIES.values():
            table.add_row(study.name, study.published, study.summary)
        Console(width=max(_out.width, RECIPE_TABLE_WIDTH)).print(table)
        return
    chosen = tuple(task.strip() for task in tasks.split(",") if task.strip()) or tuple(TASKS)
    run_study(STUDIES[name], Options(out, standard_sources(out), chosen, episodes, only), workers)
    print(f"report: {out / name}.md")


@bench_app.command("layers")
def bench_layers(
    out: Annotated[Path, typer.Option(help="Directory to write layers.md, layers.svg and layers.json to.")],
    policy: Annotated[str, typer.Option(help="pi05 or groot_n15; both if empty.")] = "",
    part: Annotated[str, typer.Option(help="language or action; both if empty.")] = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads, separated by commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each library, of about 30 ms.")] = 15,
) -> None:
    """Time the linears of released policies against torch, ONNX Runtime, OpenVINO and oneDNN, in turn.

    Rotation and rounding of the input are part of the time. What does not compute what it should is not timed.
    """
    from omega_qvla.bench.layers import SiteResult, contenders, measure_layers
    from omega_qvla.bench.report import layers_table, write_layers
    from omega_qvla.bench.sites import SITES

    sites = [site for site in SITES if policy in ("", site.policy) and part in ("", site.part)]
    if not sites:
        names = sorted({f"{site.policy} {site.part}" for site in SITES})
        raise ValueError(f"there are no layers of '{policy} {part}'; there are those of {', '.join(names)}")
    compared = contenders()
    counts = _numbers(threads)
    versions = {each.library: each.version for each in compared}
    results: list[SiteResult] = []
    with _progress() as on_progress:

        def measured(result: SiteResult) -> None:
            results.append(result)
            write_layers(out, results, versions, rounds)  # what there is, should the rest be interrupted
            on_progress(result.site.label, len(results) / (len(sites) * len(counts)))

        measure_layers(sites, compared, counts, rounds, on_site=measured)
    for count in counts:
        _out.print(f"{count} threads, ratios of medians:", highlight=False)
        _out.print(layers_table([result for result in results if result.threads == count]), soft_wrap=True)


@bench_app.command("policies")
def bench_policies(
    directories: Annotated[list[Path], typer.Argument(help="Policies, quantized or not; the first is the baseline.")],
    out: Annotated[Path, typer.Option(help="Directory to write policies.md, policies.svg and policies.json to.")],
    threads: Annotated[str, typer.Option(help="Numbers of threads, separated by commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Inferences of each policy, one per round.")] = 20,
    onnx_runtime: Annotated[
        str,
        typer.Option(help="Also the first policy, products of these parts by ONNX Runtime, such as language,action."),
    ] = "",
) -> None:
    """Time whole policies on a random observation, in turn: a chunk of actions, and each of its stages."""
    from omega_qvla.bench.contenders import OnnxFloat, TorchFloat
    from omega_qvla.bench.policies import Entry, measure_policies
    from omega_qvla.bench.report import policies_table, write_policies

    entries = [Entry(*named) for named in zip(api.labels(directories), directories, strict=True)]
    libraries = [TorchFloat.library]
    if onnx_runtime:
        parts = _parts(onnx_runtime)
        entries.insert(1, Entry(f"{entries[0].label}, ONNX Runtime in {onnx_runtime}", directories[0], parts))
        libraries.append(OnnxFloat.library)
    with _progress() as on_progress:
        found = measure_policies(
            entries,
            _numbers(threads),
            rounds=rounds,
            on_round=lambda done, of: on_progress("inferring", done / of),
        )
    write_policies(out, found, {name: version(name) for name in libraries}, rounds)
    for count in _numbers(threads):
        _out.print(f"{count} threads:", highlight=False)
        _out.print(policies_table([each for each in found if each.threads == count]), soft_wrap=True)


def _parts(text: str) -> tuple[Part, ...]:
    """Parts of a policy, separated by commas. Raises `ValueError` for anything else."""
    names: tuple[Part, ...] = get_args(Part)
    found = tuple(name for name in names if name in text.split(","))
    if unknown := set(text.split(",")) - set(found):
        raise ValueError(f"{min(unknown)!r} is no part; there are {', '.join(names)}")
    return found


def _numbers(text: str) -> list[int]:
    """Positive whole numbers, separated by commas. Raises `ValueError` for anything else."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"{text!r} are no numbers of threads; write them as 1,2")
    return [int(number) for number in text.split(",")]


@app.command()
def recipes() -> None:
    """List the recipes that come with the package, the widths at which their papers use them, and how they run.

    `integer`: weights are stored and products executed at the width. `dequantized`: weights are stored at the
    width and multiplied in floating point, because the inputs are not rounded. `simulated`: floating-point
    arithmetic imitates integers.
    """
    table = Table("recipe", "widths", "execution", "summary")
    for name in recipe_names():
        recipe = read_recipe(name)
        table.add_row(name, " ".join(recipe.widths), recipe.execution, recipe.summary)
    Console(width=max(_out.width, RECIPE_TABLE_WIDTH)).print(table)


@app.command()
def scopes() -> None:
    """List the scopes: which layers of a policy a recipe quantizes."""
    table = Table("scope", "what is quantized")
    for name in scope_names():
        table.add_row(name, scope_summary(name))
    _out.print(table)


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; must not exist. Default: a new one below runs/.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes per task.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A lerobot checkpoint of a Meta-World policy instead of the bundled one.")
    ] = None,
) -> None:
    """Quantize a policy naively, by the paper and by default, judge all of them in closed loop, write the report."""
    from omega_qvla.evaluation.report import table, write_report
    from omega_qvla.evaluation.results import save

    started = time.monotonic()
    out = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    source = checkpoint or api.bundled_checkpoint()
    with _progress() as on_progress:
        on_progress("recording calibration trajectories", 0.0)
        calibration = api.calibrate_on_rollouts(api.load(source))
        for recipe in demo_recipes():
            api.quantize(source, recipe, out / recipe.name, calibration=calibration, on_progress=on_progress)
    evaluation = api.evaluate(
        [source, *(out / recipe.name for recipe in demo_recipes())], episodes_per_task=episodes, workers=workers
    )
    save(evaluation, out / "evaluation.json")
    write_report(evaluation, out)
    print(table(evaluation))
    print(f"report: {out / 'report.html'}")
    print(json.dumps(_demo_line(evaluation, out, time.monotonic() - started)))


def demo_recipes() -> list[Recipe]:
    """The naive baseline, the paper's method and the default, all at W4A4."""
    return [
        with_settings(read_recipe("rtn"), [], name="rtn-w4a4"),
        read_recipe("omega-qvla"),
        read_recipe(DEFAULT_RECIPE),
    ]


def _demo_line(evaluation: Evaluation, out: Path, seconds: float) -> dict[str, Any]:
    """The one line of JSON in which the demo ends."""
    policies = {
        policy.label: {
            "execution": policy.execution,
            "successes": policy.success().successes,
            "episodes": policy.success().episodes,
            "action_nmse": None if policy.fidelity is None else policy.fidelity.normalized_mse,
            "bytes_on_disk": policy.bytes_on_disk,
        }
        for policy in evaluation.policies
    }
    return {"seconds": round(seconds, 1), "report": str(out / "report.html"), "policies": policies}


@contextmanager
def _progress() -> Iterator[api.OnProgress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True) as progress:
        bar = progress.add_task("reading", total=1.0)
        yield lambda what, share: progress.update(bar, description=what, completed=share)


def size_in_bytes(size: str) -> int:
    """A size such as 8GiB or 500MB in bytes. Raises `ValueError` for anything else."""
    units = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", size.strip().lower())
    if match is None or match[2] not in units:
        raise ValueError(f"{size!r} is no size; write for example 8GiB")
    return int(float(match[1]) * units[match[2]])


def _print_preflight(needs: Preflight) -> None:
    memory = ", ".join(f"{what} {size / 2**30:.1f}" for what, size in asdict(needs.memory).items())
    _err.print(
        f"needs {needs.memory.total / 2**30:.1f} GiB of memory ({memory}) and {needs.disk / 2**30:.1f} GiB of disk; "
        f"about {needs.forward_seconds / 60:.0f} minutes of calibration inferences and "
        f"{needs.solving_seconds / 60:.0f} of quantization",
        soft_wrap=True,
    )


def _summarize(out: Path, manifest: Manifest) -> None:
    report = inspect(out)
    _print_totals(report)
    _out.print(f"{out}: recipe {manifest.plan.recipe.name}, source {manifest.source.directory}")


def _print_linears(report: CheckpointReport) -> None:
    longest = max(len(linear.name) for linear in report.linears)
    name = Column("linear", no_wrap=True, min_width=longest)
    table = Table(name, "part", "bits", "scales: weight / activation", "execution", "bytes", "because")
    for linear in report.linears:
        bits = f"W{linear.weight_bits:.3g}A{linear.activation_bits}" if linear.quantized else "kept"
        row = (
            linear.name,
            linear.part,
            bits,
            linear.granularity,
            linear.execution,
            f"{linear.bytes:,}",
            linear.because,
        )
        table.add_row(*row)
    Console(width=max(_out.width, LINEAR_TABLE_WIDTH)).print(table)


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    parts = {part: asdict(each) for part, each in planned_parts(plan).items()}
    if as_json:
        print(json.dumps({"parts": parts, "linears": [asdict(each) for each in plan.linears]}, indent=1))
        return
    table = Table("linear", "part", "in", "out", "because")
    rules = {site.name: site.rule for site in plan.sites}
    for linear in plan.linears:
        because = linear.kept_because or f"rule {rules[linear.site or '']} of {plan.recipe.name}"
        table.add_row(linear.name, linear.part or "-", str(linear.in_features), str(linear.out_features), because)
    Console(width=max(_out.width, LINEAR_TABLE_WIDTH)).print(table)
    said = ", ".join(f"{part} {x['linears']} linears of {x['weights']:,} weights" for part, x in parts.items())
    kept = sum(each.site is None for each in plan.linears)
    _out.print(f"{plan.recipe.name} would quantize: {said}; {kept} linears are kept", soft_wrap=True)


def _print_totals(report: CheckpointReport) -> None:
    table = Table("what", "bytes", "share", title=f"{report.recipe} ({report.execution})", title_justify="left")
    lines = {
        f"codes of {report.quantized_linears} linears": report.codes_bytes,
        "scales": report.scales_bytes,
        "rotations": report.rotation_bytes,
        "low-rank branches": report.low_rank_bytes,
        "permutations": report.permutation_bytes,
        "factors per channel": report.factor_bytes,
        "tables per denoising step": report.step_table_bytes,
        f"kept in floating point ({report.kept_linears} linears, and all else)": report.kept_bytes,
        "all files": report.total_bytes,
    }
    lines |= {f"kept: {module}": size for module, size in list(report.kept_by_module.items())[:KEPT_MODULES]}
    for what, size in lines.items():
        table.add_row(what, f"{size:,}", f"{size / report.total_bytes:.1%}")
    _out.print(table)
    parts = ", ".join(f"{part} {x.linears} linears of {x.weights:,} weights" for part, x in report.parts.items())
    _out.print(
        f"quantized: {parts or 'nothing'}; all that is stored for them takes {report.quantized_share:.1%} of the "
        f"{report.fp16_bytes:,} bytes that these weights take at 16 bits, codes and scales "
        f"{report.codes_and_scales_share:.1%}",
        soft_wrap=True,
    )


def main() -> None:
    """Run the command; what the user can mend is one sentence and exit code 2."""
    try:
        app()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        _err.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        sys.exit(2)
