"""Recipes as data: what is quantized, how, and what is kept.

A recipe is a list of rules over the policy's linear layers. The first rule whose part and pattern match a
layer decides about it. Every method is a composition of the same few pieces, so a recipe is also the
complete description that a checkpoint carries.
"""

from __future__ import annotations

import json
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True)

Part = Literal["vision", "language", "action"]
Bits = Annotated[int, Field(ge=2, le=8)]


class RecipeError(ValueError):
    """A recipe that cannot be read, or that does not fit the policy; the message says what to change."""


@dataclass(frozen=True, config=STRICT)
class TransformSpec:
    """What happens to an input, and inversely to the weights that read it, before either is rounded.

    In order: division by the smoothing factor, permutation, rotation in blocks, division by the folded
    factor. All of it is exact in real arithmetic (Ω-QVLA Eq. 6-7).
    """

    smoothing: float | None = None
    """SmoothQuant's α: input channel j is divided by peak(X_j)^α / peak(W_j)^(1-α) (SmoothQuant Eq. 4)."""
    permutation: Literal["none", "zigzag"] = "none"
    """Deal the channels to the blocks so that each gets the same share of weight energy (Ω-QVLA §4.1)."""
    rotation: Literal["none", "svd", "hadamard", "svd_hadamard"] = "none"
    """Orthogonal matrix per block of channels (Ω-QVLA Eq. 3-5)."""
    block_size: int = 64
    """Channels in a block; a power of two that divides the layer's input width."""
    folded_percentile: float | None = None
    """If set, rotated channel j is further divided by this percentile of |X'_j| over all steps, so that one
    scalar per step remains of a table of scales per step and channel (docs/methods.md)."""
    sharing: Literal["site", "linear"] = "site"
    """Whether linears that read one input share one transform, or each has its own as in the paper."""


@dataclass(frozen=True, config=STRICT)
class WeightSpec:
    """How a weight is rounded."""

    bits: Bits = 4
    group_size: int | None = None
    """Input channels that share a scale; None: one scale per output channel."""
    scale_search: Literal["max", "mse"] = "max"
    rounding: Literal["rtn", "gptq"] = "rtn"
    damping: float = 0.01
    """Share of the Hessian's mean diagonal that GPTQ adds to its diagonal."""


@dataclass(frozen=True, config=STRICT)
class ActivationSpec:
    """How an input is rounded while the policy runs."""

    bits: Bits = 4
    granularity: Literal["token", "token_group", "tensor", "channel"] = "token"
    """What shares a scale. An integer product cannot apply a scale per input channel: `channel` is simulated."""
    mode: Literal["dynamic", "per_step", "static"] = "dynamic"
    """Scales from the input itself, or calibrated per denoising step, or calibrated once."""
    group_size: int | None = None
    """Channels that share a scale; only with `token_group`."""
    percentile: float = 99.9
    """Of |X| over the calibration tokens; with calibrated scales only (Ω-QVLA Eq. 10)."""

    def __post_init__(self) -> None:
        dynamic = self.granularity in ("token", "token_group")
        if dynamic != (self.mode == "dynamic"):
            raise ValueError(f"granularity {self.granularity!r} does not go with mode {self.mode!r}")
        if (self.granularity == "token_group") != (self.group_size is not None):
            raise ValueError("group_size belongs to granularity 'token_group', and only to it")

    @property
    def executable(self) -> bool:
        """Whether an integer product can apply these scales."""
        return self.granularity != "channel"


@dataclass(frozen=True, config=STRICT)
class LinearSpec:
    """How the linears of one input site are quantized."""

    transform: TransformSpec = Field(default_factory=TransformSpec)
    weight: WeightSpec = Field(default_factory=WeightSpec)
    activation: ActivationSpec = Field(default_factory=ActivationSpec)

    def __post_init__(self) -> None:
        groups = self.weight.group_size, self.activation.group_size
        if None not in groups and groups[0] != groups[1]:
            raise ValueError(f"weights in groups of {groups[0]} and activations in groups of {groups[1]}")

    @property
    def executable(self) -> bool:
        return self.activation.executable

    @property
    def needs_hessian(self) -> bool:
        return self.weight.rounding == "gptq"

    @property
    def needs_samples(self) -> bool:
        return self.activation.mode != "dynamic" or self.transform.folded_percentile is not None

    @property
    def needs_calibration(self) -> bool:
        return self.needs_hessian or self.needs_samples or self.transform.smoothing is not None


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
class Recipe:
    """A named list of rules, first match wins."""

    name: str
    summary: str
    rules: tuple[Rule, ...]
    source: str = ""
    """The paper, section or document that defines the method."""

    @property
    def execution(self) -> Literal["float", "integer", "simulated"]:
        """The best way in which all of its linears can run."""
        specs = [rule.quantize for rule in self.rules if rule.quantize is not None]
        if not specs:
            return "float"
        return "integer" if all(spec.executable for spec in specs) else "simulated"


_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    directory = resources.files("omega_qvla") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in directory.iterdir() if entry.name.endswith(".toml"))


def read_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe by its name, or from a TOML file.

    Raises `RecipeError` if there is none, or if a key or value in it is not of a recipe.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {path}")
        text, origin = path.read_text(), str(path)
    elif str(name_or_path) in recipe_names():
        text = (resources.files("omega_qvla") / "recipes" / f"{name_or_path}.toml").read_text()
        origin = f"recipe {name_or_path}"
    else:
        raise RecipeError(f"there is no recipe {str(name_or_path)!r}; there are {', '.join(recipe_names())}")
    try:
        return recipe_from_dict(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecipeError) as error:
        raise RecipeError(f"{origin}: {error}") from error


def recipe_from_dict(data: dict[str, Any]) -> Recipe:
    """Raises `RecipeError` that names the key which does not belong, or the value that is not allowed."""
    try:
        # As JSON, because strict validation takes Python lists for tuples from nowhere else.
        return _RECIPE.validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{place}: {first['msg']} (found {first['input']!r})") from error


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-compatible data, complete with defaults."""
    return _RECIPE.dump_python(recipe, mode="json")
