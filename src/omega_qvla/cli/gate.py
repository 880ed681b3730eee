"""The command that is run before a robot moves: check."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from omega_qvla.cli.benchmark_options import Env, EnvOption, ProfileOption, SuiteOption, chosen_benchmark
from omega_qvla.cli.shared import OUT, Execution, app, progress
from omega_qvla.cli.tables import print_wide

if TYPE_CHECKING:
    from omega_qvla.gate import GateReport

CHECK_TABLE_WIDTH = 100
FAILED = 1
"""The exit code of a gate that fails; 2 is for input that cannot be checked."""


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(help="A quantized checkpoint.")],
    against: Annotated[Path, typer.Option(help="The checkpoint in floating point that it was made from.")],
    observations: Annotated[int, typer.Option(min=2, help="How many both answer.")] = 256,
    dataset: Annotated[
        Path | None, typer.Option(help="Observations of a local lerobot dataset instead of rollouts.")
    ] = None,
    env: EnvOption = Env.metaworld,
    suite: SuiteOption = None,
    profile: ProfileOption = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a limit of the recipe, such as gate.error_p95=0.2.")
    ] = None,
    gripper: Annotated[
        str, typer.Option(help="Its dimension of the action, or `none`; if empty, the simulator's, or the last.")
    ] = "",
    gripper_threshold: Annotated[float, typer.Option(help="Where its command turns, with --gripper.")] = 0.0,
    execution: Annotated[Execution, typer.Option(help="Arithmetic of executable recipes.")] = Execution.integer,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure and limit here.")] = None,
) -> None:
    """Hold a quantized policy's actions against full precision's before a robot moves; exit with 1 if they differ.

    Both answer the same held-out observations under the same noise. Limits are multiples of full precision's own
    spread under other noise, from the recipe.
    """
    from omega_qvla.evaluation.results import write_text
    from omega_qvla.gate import Gripper
    from omega_qvla.gate import check as run

    elsewhere = env is not Env.metaworld or suite is not None or profile is not None
    if dataset is not None and elsewhere:
        raise ValueError("observations are of a dataset or of rollouts: leave out --dataset or --env and its options")
    with progress() as on_progress:
        report = run(
            directory,
            against,
            observations=observations,
            dataset=dataset,
            benchmark=chosen_benchmark(env, suite, profile) if elsewhere else None,
            gripper=Gripper(_dimension(gripper), gripper_threshold) if gripper else None,
            settings=settings or [],
            execution=execution.value,
            on_progress=on_progress,
        )
    if json_file is not None:
        write_text(json_file, json.dumps(_document(report), indent=1, allow_nan=False) + "\n")
    _print(report)
    if not report.passed:
        raise typer.Exit(FAILED)


def _dimension(text: str) -> int | None:
    """Raises `ValueError` for what is neither a whole number nor `none`."""
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--gripper {text!r} is no dimension; write a whole number, or none") from None


def _document(report: GateReport) -> dict[str, Any]:
    from omega_qvla.evaluation.results import describe_machine

    checks = [asdict(check) | {"passed": check.passed} for check in report.checks]
    return {"passed": report.passed} | asdict(report) | {"checks": checks, "machine": asdict(describe_machine())}


def _print(report: GateReport) -> None:
    title = f"{report.policy} ({report.execution}) against full precision, {report.observations} observations"
    table = Table("measure", "dimension", title=title, title_justify="left")
    for column in ("quantized", "full precision's own", "limit"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for each in report.checks:
        form = ".2%" if each.unit == "share" else ".4f"
        figures = (format(figure, form) for figure in (each.value, each.own, each.limit))
        verdict = "pass" if each.passed else "[red]FAIL[/]"
        table.add_row(each.measure, "" if each.dimension is None else str(each.dimension), *figures, verdict)
    print_wide(table, CHECK_TABLE_WIDTH)
    for missing in report.not_measured:
        OUT.print(f"not measured: {missing}", soft_wrap=True)
    OUT.print(f"observations: {report.source}", soft_wrap=True)
    if not report.held_out:
        OUT.print("calibration saw these episodes too: the figures flatter", soft_wrap=True)
    failed = sum(not each.passed for each in report.checks)
    OUT.print(f"the gate fails: {failed} of {len(report.checks)} checks" if failed else "the gate passes")
