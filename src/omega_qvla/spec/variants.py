"""Variants of a recipe: other settings, other layers."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from omega_qvla.spec.linear import STRICT
from omega_qvla.spec.recipe import Part, Recipe, RecipeError, Rule, read_recipe, recipe_from_dict, recipe_to_dict

_PARTS = get_args(Part)
_PIECES = ("transform", "weight", "activation")


@dataclass(frozen=True, config=STRICT)
class Undivided:
    """Layers whose input is not made of a recipe's blocks and groups."""

    match: str
    block_size: int
    """Of transforms instead; scales are per output channel and per token instead of per group."""

    def instead_of(self, rule: Rule) -> list[Rule]:
        """The rule that decides about these layers before `rule` does, if that quantizes all of its part; none for
        rounding that is defined by its groups."""
        spec = rule.quantize
        if spec is None or rule.match != ".*" or spec.weight.rounding == "gptq_blockwise":
            return []
        activation = spec.activation
        if activation.granularity == "token_group":
            activation = replace(activation, granularity="token", group_size=None)
        spec = replace(
            spec,
            transform=replace(spec.transform, block_size=min(self.block_size, spec.transform.block_size)),
            weight=replace(spec.weight, group_size=None),
            activation=activation,
        )
        return [replace(rule, match=self.match, quantize=spec)]


@dataclass(frozen=True, config=STRICT)
class Scope:
    """Which of the layers that a recipe decides about are quantized; data of `scopes.toml`."""

    summary: str
    keep: tuple[Rule, ...] = ()
    """Rules that come before the recipe's."""
    keeps_nothing: bool = False
    """Whether the recipe's own rules to keep layers fall away, in parts of which it quantizes others."""
    vision_as: Part | None = None
    """The part whose rules hold for the vision tower too."""
    undivided: Undivided | None = None
    """Layers of the vision tower that these rules would not fit."""


def recipe_as(name: str | Path, settings: Sequence[str], scope: str) -> Recipe:
    """A recipe by its name or TOML file, with settings, on the layers of a scope.

    Raises `RecipeError` as these three do.
    """
    return with_scope(with_settings(read_recipe(name), settings), scope)


def with_settings(recipe: Recipe, settings: Sequence[str], name: str | None = None) -> Recipe:
    """The recipe with fields replaced, such as `activation.bits=8` in every rule that quantizes,
    `language.weight.rounding=gptq` in those of one part, `corrections.limit=0.4`, `gate.error_p95=0.2`.

    Values are TOML; a bare word is a string, `null` takes a value away. Without `name` the settings are appended
    to the recipe's name.

    Raises `RecipeError` for what is no setting, a key that does not exist or a value that is not allowed.
    """
    data = recipe_to_dict(recipe)
    for setting in settings:
        key, separator, text = setting.partition("=")
        path = key.strip().split(".")
        part = path.pop(0) if path[0] in _PARTS else None
        if not separator or len(path) < 2 or path[0] not in (*_PIECES, "corrections", "gate"):
            raise RecipeError(
                f"{setting!r} is no setting; write for example activation.bits=8 or language.weight.rounding=gptq"
            )
        for target in _targets(data, path[0], part, setting):
            *parents, leaf = path
            for parent in parents:
                if target.get(parent) is None:
                    target[parent] = {}
                target = target[parent]
            target[leaf] = _value(text.strip())
    data["name"] = name or " ".join([recipe.name, *settings])
    return recipe_from_dict(data)


def with_scope(recipe: Recipe, name: str) -> Recipe:
    """The recipe on the layers of a scope, which is appended to its name.

    Raises `RecipeError` if there is no scope of that name, or nothing of the recipe is in it.
    """
    if name not in scope_names():
        raise RecipeError(f"there is no scope {name!r}; there are {', '.join(scope_names())}")
    scope = _scopes()[name]
    whole = {rule.part for rule in scope.keep if rule.match == ".*"}
    same = {(rule.part, rule.match) for rule in scope.keep}
    rules = [rule for rule in recipe.rules if rule.part not in whole and (rule.part, rule.match) not in same]
    if scope.keeps_nothing:
        quantized = {rule.part for rule in rules if rule.quantize is not None}
        rules = [rule for rule in rules if rule.quantize is not None or rule.part not in quantized]
    if scope.vision_as is not None:
        source = [rule for rule in recipe.rules if rule.part == scope.vision_as]
        rules = [rule for rule in rules if rule.part != "vision"]
        vision = [replace(rule, part="vision") for rule in source]
        if scope.undivided is not None:
            rules += [narrow for rule in vision for narrow in scope.undivided.instead_of(rule)]
        rules += vision
    if not any(rule.quantize is not None for rule in rules):
        raise RecipeError(f"recipe {recipe.name!r} quantizes nothing in scope {name!r}")
    label = recipe.name if scope == Scope(scope.summary) else f"{recipe.name} ({name})"
    return replace(recipe, name=label, rules=(*scope.keep, *rules))


def scope_names() -> list[str]:
    """The scopes that come with the package; `policy` is the recipe as it is written."""
    return list(_scopes())


def scope_summary(name: str) -> str:
    """What a scope quantizes, in a line."""
    return _scopes()[name].summary


@cache
def _scopes() -> dict[str, Scope]:
    text = (resources.files("omega_qvla.spec") / "scopes.toml").read_text()
    return TypeAdapter(dict[str, Scope]).validate_json(json.dumps(tomllib.loads(text)))


def _targets(data: dict[str, Any], piece: str, part: str | None, setting: str) -> list[dict[str, Any]]:
    if piece == "corrections":
        if part is not None or data["corrections"] is None:
            raise RecipeError(f"{setting!r}: recipe {data['name']!r} has no corrections to set")
        return [data]
    if piece == "gate":
        if part is not None:
            raise RecipeError(f"{setting!r}: the gate is one for the whole policy; write gate.error_p95=0.2")
        return [data]
    rules = [rule for rule in data["rules"] if rule["quantize"] is not None and part in (None, rule["part"])]
    if not rules:
        raise RecipeError(f"{setting!r}: recipe {data['name']!r} quantizes nothing in part {part!r}")
    return [rule["quantize"] for rule in rules]


def _value(text: str) -> Any:
    if text == "null":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
