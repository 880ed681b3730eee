"""Commands that make checkpoints and say what is in them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from omega_qvla import api
from omega_qvla.cli.benchmark_options import Env, EnvOption, ProfileOption, SuiteOption, chosen_benchmark
from omega_qvla.cli.shared import DEFAULT_RECIPE, DEFAULT_SCOPE, OUT, app, progress, size_in_bytes
from omega_qvla.cli.tables import (
    RECIPE_TABLE_WIDTH,
    print_linears,
    print_plan,
    print_preflight,
    print_totals,
    print_wide,
)
from omega_qvla.pack.checkpoint import is_checkpoint
from omega_qvla.pack.inspect import inspect
from omega_qvla.spec import read_recipe, recipe_as, recipe_names, scope_names, scope_summary


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
        int, typer.Option(min=1, help="Episodes of the policy itself to calibrate on.")
    ] = api.CALIBRATION_TRAJECTORIES,
    env: EnvOption = Env.metaworld,
    suite: SuiteOption = None,
    profile: ProfileOption = None,
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
    chosen = recipe_as(recipe, settings or [], scope)
    elsewhere = env is not Env.metaworld or suite is not None or profile is not None
    if elsewhere and dataset is not None:
        raise ValueError("calibration is on a dataset or on rollouts: leave out --dataset, or --env and its options")
    with progress() as on_progress:
        manifest = api.quantize(
            checkpoint,
            chosen,
            out,
            calibration=None if dataset is None else api.calibrate_on_dataset(dataset, observations),
            trajectories=trajectories,
            benchmark=chosen_benchmark(env, suite, profile) if elsewhere else None,
            memory_budget=budget,
            on_preflight=print_preflight,
            on_progress=on_progress,
        )
    print_totals(inspect(out))
    OUT.print(f"{out}: recipe {manifest.plan.recipe.name}, source {manifest.source.directory}")


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
        chosen = recipe_as(recipe or DEFAULT_RECIPE, settings or [], scope or DEFAULT_SCOPE)
        print_plan(api.plan(directory, chosen), as_json=as_json)
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
    print_linears(report)
    print_totals(report)
    if memory is not None:
        OUT.print(
            f"loaded and idle it takes {memory.total:,} bytes of memory ({memory.anonymous:,} of its own, "
            f"{memory.file_backed:,} mapped from its files): {memory.total / report.total_bytes:.1%} of its files",
            soft_wrap=True,
        )


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
    print_wide(table, RECIPE_TABLE_WIDTH)


@app.command()
def scopes() -> None:
    """List the scopes: which layers of a policy a recipe quantizes."""
    table = Table("scope", "what is quantized")
    for name in scope_names():
        table.add_row(name, scope_summary(name))
    OUT.print(table)
