"""What can be quantized in a module of code that no package carries, as data: the names of its linears."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from omega_qvla.spec import Recipe
from omega_qvla.spec.linear import STRICT
from omega_qvla.spec.named import names_in, read_named

_DIRECTORY = resources.files("omega_qvla.policies.targets")


class TargetError(ValueError):
    """A target that cannot be read, or that does not fit the module; the message says what to change."""


@dataclass(frozen=True, config=STRICT)
class Stack:
    """Blocks of one kind that run one after the other."""

    part: Literal["vision", "language"]
    """Only these: what runs in denoising steps needs an adapter that follows the steps."""
    blocks: str
    """Name of the `ModuleList` or `Sequential` that holds the blocks."""
    inputs: dict[str, tuple[str, ...]]
    """A name for each input of a block, in the order in which they are read: the linears that read it, as the block
    calls them."""
    optional: bool = False
    """Whether some of the target's models lack this stack."""

    def __post_init__(self) -> None:
        linears = [linear for readers in self.inputs.values() for linear in readers]
        if not linears or not all(self.inputs.values()):
            raise ValueError(f"{self.blocks}: every input needs a linear that reads it")
        if twice := {linear for linear in linears if linears.count(linear) > 1}:
            raise ValueError(f"{self.blocks}: {min(twice)} reads two inputs")


@dataclass(frozen=True, config=STRICT)
class Target:
    """The anatomy of a model: stacks in execution order, and why every other linear stays in floating point."""

    name: str
    """What a checkpoint calls the family."""
    summary: str
    source: str
    stacks: tuple[Stack, ...]
    kept: dict[str, str]
    """Reasons; keys are regular expressions, searched in the linears' full names."""
    files: tuple[str, ...]
    """Patterns of the files in the model's directory that a checkpoint needs besides weights."""

    def __post_init__(self) -> None:
        if not self.stacks:
            raise ValueError("a target needs a stack")
        for pattern in self.kept:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error

    def narrowed(self, recipe: Recipe) -> Recipe:
        """The recipe without its rules for parts that the target does not have."""
        parts = {stack.part for stack in self.stacks}
        return replace(recipe, rules=tuple(rule for rule in recipe.rules if rule.part in parts))


_TARGET: TypeAdapter[Target] = TypeAdapter(Target)


def target_names() -> list[str]:
    """The targets that come with the package."""
    return names_in(_DIRECTORY)


def read_target(name_or_path: str | Path) -> Target:
    """A target by its name, or from a TOML file.

    Raises `TargetError` if there is none, or if a key or value in it is not of a target.
    """
    return read_named("target", name_or_path, _DIRECTORY, target_from_dict, TargetError)


def target_from_dict(data: dict[str, Any]) -> Target:
    """Raises `TargetError` that names the key which does not belong, or the value that is not allowed."""
    try:
        # As JSON, because strict validation takes Python lists for tuples from nowhere else.
        return _TARGET.validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(key) for key in first["loc"])
        raise TargetError(f"{place}: {first['msg']} (found {first['input']!r})") from error
