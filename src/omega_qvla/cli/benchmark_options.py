"""Options that choose what policies act in."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from omega_qvla import api

if TYPE_CHECKING:
    from omega_qvla.evaluation.benchmark import Benchmark


class Env(StrEnum):
    """The simulators."""

    metaworld = "metaworld"
    libero = "libero"


EnvOption = Annotated[Env, typer.Option(help="Meta-World's MT10, or a suite of LIBERO.")]
SuiteOption = Annotated[str | None, typer.Option(help="LIBERO's suite: spatial, object, goal or long.")]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        help="Whose step limits, waiting, replanning and initial states on LIBERO: openpi, lerobot, omega-qvla, or a "
        "TOML file."
    ),
]


def chosen_benchmark(env: Env, suite: str | None, profile: str | None) -> Benchmark:
    """What the three options name together. Raises as `api.benchmark_named` does."""
    return api.benchmark_named(env.value, suite, profile)
