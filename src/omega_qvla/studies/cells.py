"""Cells that measure one recipe on one source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from omega_qvla.spec import Recipe, recipe_to_dict
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.sweep import digest


def recipe_cells(
    options: Options, recipes: Mapping[str, Recipe | None], measure: Callable[..., Result], **settings: Any
) -> list[Cell]:
    """`SOURCE-VARIANT` for every source and variant; a recipe of None is full precision.

    `measure`: a module-level function of source, checkpoint, variant and the settings, which are JSON.
    """
    return [
        Cell(
            f"{source}-{variant}",
            {
                "source": source,
                "checkpoint": digest(checkpoint),
                "recipe": None if recipe is None else recipe_to_dict(recipe),
                **settings,
            },
            partial(measure, source, checkpoint, variant, **settings),
        )
        for source, checkpoint in options.sources.items()
        for variant, recipe in recipes.items()
    ]
