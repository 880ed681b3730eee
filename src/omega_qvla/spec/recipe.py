"""A recipe: rules over the policy's linear layers, the first that matches decides."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from omega_qvla.spec.gate import GateSpec
from omega_qvla.spec.linear import STRICT, Arithmetic, LinearSpec
from omega_qvla.spec.named import names_in, read_named

Part = Literal["vision", "language", "action"]
_FROM_WORST: tuple[Arithmetic, ...] = ("simulated", "dequantized", "integer")


class RecipeError(ValueError):
    """A recipe that cannot be read, or that does not fit the policy; the message says what to change."""


@dataclass(frozen=True, config=STRICT)
class Rule:
    """A decision about the layers of one part whose name matches a regular expression."""

    part: Part
    match: str = ".*"
    """Searched in the layer's full name."""
    quantize: LinearSpec | None = None
    keep: str | None = None
    """The reason to leave the layers in floating point."""

    def __post_init__(self) -> None:
        if (self.quantize is None) == (self.keep is None):
            raise ValueError("a rule has either a `quantize` table or a `keep` reason")
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match {self.match!r} is no regular expression: {error}") from error


@dataclass(frozen=True, config=STRICT)
class CorrectionSpec:
    """Scalars that bring the quantized attention back to full precision's statistics (QuantVLA §3.3).

    They are folded into the dequantization scales: the running policy has no new operator.
    """

    part: Literal["language", "action"] = "action"
    temperature: bool = True
    """Per head α = std(logits of the teacher) / std(logits of the student), on the queries (ATM, Eq. 9-11)."""
    balance: bool = True
    """Per layer β = RMS(teacher) / RMS(student) of the attention's output (OHB, Eq. 14-16)."""
    limit: float = 0.30
    """Largest |log α| and |log β| (Appendix D)."""
    dead_band: float = 0.03
    """|log α| and |log β| below this are taken for 0."""


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A named list of rules, first match wins."""

    name: str
    summary: str
    rules: tuple[Rule, ...]
    source: str = ""
    """The paper, section or document that defines the method."""
    widths: tuple[str, ...] = ()
    """Those at which its paper uses it, such as `W4A8`."""
    corrections: CorrectionSpec | None = None
    """What is done after all layers have been rounded."""
    calibration_inputs: Literal["full_precision", "quantized"] = "full_precision"
    """What a language layer reads while statistics are taken: what the full-precision layers before it give, or the
    layers as they are quantized already. Vision and action layers run several times per inference; theirs are in
    full precision until all of them have been visited."""
    gate: GateSpec | None = Field(default=None, exclude_if=lambda gate: gate is None)
    """Limits that replace those of `check`. It changes nothing that is quantized, so what has none does not state it:
    data written before there were gates stays what it is."""

    @property
    def execution(self) -> Literal["float"] | Arithmetic:
        """The best way in which all of its linears can run."""
        ways = {rule.quantize.execution for rule in self.rules if rule.quantize is not None}
        return next((way for way in _FROM_WORST if way in ways), "float")


_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)
_DIRECTORY = resources.files("omega_qvla") / "recipes"


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return names_in(_DIRECTORY)


def read_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe by its name, or from a TOML file.

    Raises `RecipeError` if there is none, or if a key or value in it is not of a recipe.
    """
    return read_named("recipe", name_or_path, _DIRECTORY, recipe_from_dict, RecipeError)


def recipe_from_dict(data: dict[str, Any]) -> Recipe:
    """Raises `RecipeError` that names the key which does not belong, or the value that is not allowed."""
    try:
        # As JSON, because strict validation takes Python lists for tuples from nowhere else.
        return _RECIPE.validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = _place(data, first["loc"])
        # A value that several types are allowed for has an error for each of them.
        reasons = dict.fromkeys(each["msg"] for each in error.errors() if _place(data, each["loc"]) == place)
        raise RecipeError(f"{place}: {'; or '.join(reasons)} (found {first['input']!r})") from error


def _place(data: Any, path: tuple[str | int, ...]) -> str:
    """The keys of an error's path; after a value that is no table or list, the path names types."""
    keys: list[str] = []
    for key in path:
        if not isinstance(data, dict | list):
            break
        keys.append(str(key))
        data = data[int(key)] if isinstance(data, list) else data.get(key)
    return ".".join(keys)


def recipe_to_dict(recipe: Recipe, *, defaults: bool = True) -> dict[str, Any]:
    """The recipe as JSON-compatible data, complete with defaults or without them."""
    return _RECIPE.dump_python(recipe, mode="json", exclude_defaults=not defaults)
