"""What every command prints to and reads its options with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from omega_qvla import api

if TYPE_CHECKING:
    from omega_qvla.evaluation.workers import Workers

app = typer.Typer(
    help="Quantize Vision-Language-Action policies to 4 bits, run them, and prove that they still work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OUT, ERR = Console(), Console(stderr=True)

DEFAULT_RECIPE, DEFAULT_SCOPE = "omega-int4", "policy"
DEFAULT_WORKERS = 2


class Execution(StrEnum):
    """How linears with executable scales run."""

    integer = "integer"
    simulated = "simulated"


WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes, two if not given; with --ray jobs at a time, as many as the cluster has CPUs if not given. "
        "The result does not depend on them.",
    ),
]
RayOption = Annotated[
    str,
    typer.Option(
        help="Run on a Ray cluster: `auto` (this machine's), HOST:PORT, or `local` (one that is started for this).",
        metavar="ADDRESS",
    ),
]


def workers_of(workers: int | None, ray: str) -> Workers:
    """What both options say together."""
    from omega_qvla.evaluation.ray_cluster import RayCluster

    return RayCluster(ray, workers) if ray else workers or DEFAULT_WORKERS


@contextmanager
def progress() -> Iterator[api.OnProgress]:
    """A bar on stderr with the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR, transient=True) as progress:
        bar = progress.add_task("reading", total=1.0)
        yield lambda what, share: progress.update(bar, description=what, completed=share)


def size_in_bytes(size: str) -> int:
    """A size such as 8GiB or 500MB in bytes. Raises `ValueError` for anything else."""
    units = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", size.strip().lower())
    if match is None or match[2] not in units:
        raise ValueError(f"{size!r} is no size; write for example 8GiB")
    return int(float(match[1]) * units[match[2]])
