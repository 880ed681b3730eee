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


EnvOption = Annotated[Env, typer.Option(help="The simulator.")]
SuiteOption = Annotated[
    str | None,
    typer.Option(
        help="LIBERO's: spatial, object, goal or long. Meta-World's: mt10, or with --profile lerobot also easy, "
        "medium, hard, very_hard or mt50."
    ),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        help="Whose cameras and step limits: on LIBERO openpi's, lerobot's, omega-qvla's or those of a TOML file; on "
        "Meta-World omega-qvla's, which is meant without it, or lerobot's."
    ),
]


def chosen_benchmark(env: Env, suite: str | None, profile: str | None) -> Benchmark:
    """What the three options name together. Raises as `api.benchmark_named` does."""
    return api.benchmark_named(env.value, suite, profile)
