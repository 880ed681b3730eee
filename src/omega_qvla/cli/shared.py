"""What every command prints to and reads its options with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from omega_qvla import api

app = typer.Typer(
    help="Quantize Vision-Language-Action policies to 4 bits, run them, and prove that they still work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OUT, ERR = Console(), Console(stderr=True)

DEFAULT_RECIPE, DEFAULT_SCOPE = "omega-int4", "policy"


class Execution(StrEnum):
    """How linears with executable scales run."""

    integer = "integer"
    simulated = "simulated"


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
