"""The manifest: everything that a checkpoint says about itself."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from omega_qvla.spec import LinearSpec, Part, Recipe

MANIFEST_FILE = "manifest.json"
QUANTIZED_FILE = "quantized.safetensors"
KEPT_FILE = "kept.safetensors"
CARD_FILE = "README.md"
"""The model card: the only file that may lie beside those that the manifest names. Nothing reads it."""
POLICY_DIRECTORY = "policy"
"""Configuration, processors and tokenizer of the policy, as its own library wrote them."""

FORMAT = "omega-qvla"
FORMAT_VERSION = 3
"""Version 2 added rows of mixed widths, low-rank branches, two more rotations and corrections; version 3 recipes that
say what language layers read while they are calibrated."""
_READABLE = (1, 2, 3)

_DATA = ConfigDict(extra="forbid")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as it is; the message names what is wrong and where."""


@dataclass(frozen=True, config=_DATA)
class PlannedLinear:
    """One linear of the policy: quantized in a site, or kept for a reason."""

    name: str
    in_features: int
    out_features: int
    part: Part | None
    """None for layers outside the parts that a recipe can address."""
    site: str | None
    kept_because: str | None

    def __post_init__(self) -> None:
        if (self.site is None) == (self.kept_because is None):
            raise ValueError(f"{self.name} must be quantized in a site or kept for a reason")


@dataclass(frozen=True, config=_DATA)
class PlannedSite:
    """The linears that read one input and the rule of the recipe that decides about them."""

    name: str
    part: Part
    block: str
    """The layer of the policy to which the site belongs; blocks are quantized in execution order."""
    in_features: int
    linears: tuple[str, ...]
    rule: int
    """Index into the recipe's rules."""


@dataclass(frozen=True, config=_DATA)
class Plan:
    """A recipe resolved to every linear of a policy; sites in execution order."""

    recipe: Recipe
    sites: tuple[PlannedSite, ...]
    linears: tuple[PlannedLinear, ...]

    def spec(self, site: PlannedSite) -> LinearSpec:
        """How a site is quantized. Raises `CheckpointError` if its rule quantizes nothing."""
        known = 0 <= site.rule < len(self.recipe.rules)
        spec = self.recipe.rules[site.rule].quantize if known else None
        if spec is None:
            raise CheckpointError(f"{site.name} refers to rule {site.rule}, which quantizes nothing")
        return spec

    @property
    def needs_calibration(self) -> bool:
        rules = any(self.spec(site).needs_calibration for site in self.sites)
        return rules or self.recipe.corrections is not None


@dataclass(frozen=True, config=_DATA)
class Source:
    """The checkpoint that was quantized."""

    directory: str
    """Its name, without the path."""
    sha256: dict[str, str]
    """Of each of its files."""


@dataclass(frozen=True, config=_DATA)
class CalibrationRecord:
    """What the statistics were taken from."""

    observations: int
    trajectories: tuple[str, ...] = ()
    """Their ids, such as `reach-v3:500000`."""
    noise_seed: int = 0


@dataclass(frozen=True, config=_DATA)
class FileRecord:
    bytes: int
    sha256: str


@dataclass(frozen=True, config=_DATA)
class Manifest:
    """The content of `manifest.json`."""

    family: str
    """The adapter that can run the policy, such as `pi05`."""
    denoising_steps: int
    plan: Plan
    source: Source
    calibration: CalibrationRecord | None
    """None for recipes that need no calibration."""
    files: dict[str, FileRecord]
    """Every other file of the checkpoint."""
    versions: dict[str, str] = Field(default_factory=dict)
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def manifest_to_json(manifest: Manifest) -> str:
    return json.dumps(_MANIFEST.dump_python(manifest, mode="json"), indent=1) + "\n"


def manifest_from_json(text: str) -> Manifest:
    """Raises `CheckpointError` if the text is no manifest, or one of a later format."""
    try:
        data: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"manifest.json is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError("manifest.json is not of a checkpoint that this program wrote")
    if data.get("format_version") not in _READABLE:
        raise CheckpointError(
            f"the checkpoint has format version {data.get('format_version')}, "
            f"this program reads {' and '.join(map(str, _READABLE))}"
        )
    try:
        return _MANIFEST.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"manifest.json: {place}: {first['msg']}") from error
