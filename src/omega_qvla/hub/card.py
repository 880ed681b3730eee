"""The model card: what a checkpoint says about itself, measured on its files, and the evidence that there is for it.

Nothing in it is typed by hand but where the policy comes from, which no file says: `Origin`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from huggingface_hub import ModelCard, ModelCardData

from omega_qvla.hub.contents import HubError
from omega_qvla.pack.checkpoint import read_manifest
from omega_qvla.pack.inspect import CheckpointReport, LinearReport, inspect
from omega_qvla.pack.manifest import CARD_FILE, Manifest
from omega_qvla.spec import Recipe, recipe_to_dict

if TYPE_CHECKING:
    from omega_qvla.evaluation.results import Evaluation, PolicyResult

LIBRARY = "omega-qvla"
_TEMPLATE = "card.md.jinja"
_FP16_BITS = 16
_BY_NAME = "The evaluation does not say which checkpoint it judged: it is taken for this one by its name."


@dataclass(frozen=True)
class Origin:
    """Where the floating-point policy is published, as far as its user says so."""

    repository: str | None = None
    """On the Hub, such as `lerobot/pi05_base`."""
    revision: str | None = None
    """The commit, tag or branch that was quantized."""
    licence: str | None = None
    """The Hub's word for it, such as `apache-2.0`."""


@dataclass(frozen=True)
class PartSize:
    """The quantized linears of one part of a policy."""

    part: str
    linears: int
    weights: int
    width: str
    """`W4A4` where codes of that width are stored and multiplied, else in words."""
    bytes: int
    """Of codes, scales and biases, measured on the files."""
    share: float
    """Of what the weights take at 16 bits."""


def model_card(directory: Path, origin: Origin = Origin(), evidence: Evaluation | None = None) -> str:
    """The card of a quantized checkpoint, Markdown with the Hub's metadata in front.

    Raises `CheckpointError` for a damaged checkpoint, `HubError` if the evidence is not about it.
    """
    report, manifest = inspect(directory), read_manifest(directory)
    recipe = manifest.plan.recipe
    metadata = ModelCardData(
        license=origin.licence,
        base_model=origin.repository,
        base_model_relation=None if origin.repository is None else "quantized",
        library_name=LIBRARY,
        pipeline_tag="robotics",
        tags=["robotics", "vision-language-action", "quantized", manifest.family],
    )
    template = (resources.files("omega_qvla.hub") / _TEMPLATE).read_text(encoding="utf-8")
    card = ModelCard.from_template(
        metadata,
        template_str=template,
        manifest=manifest,
        recipe=recipe,
        recipe_toml=recipe_to_toml(recipe),
        origin=origin,
        report=report,
        parts=part_sizes(report, manifest),
        evidence=None if evidence is None else _shown(evidence, _judged(directory, manifest, evidence)),
    )
    return str(card)


def write_card(directory: Path, text: str) -> Path:
    """Put a card into a checkpoint, in place of the one that is there."""
    partial = directory.with_name(f".{directory.name}.{CARD_FILE}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, directory / CARD_FILE)
    return directory / CARD_FILE


def recipe_to_toml(recipe: Recipe) -> str:
    """The recipe as a TOML file from which `read_recipe` makes the same one; defaults but widths are left out."""
    short, whole = recipe_to_dict(recipe, defaults=False), recipe_to_dict(recipe)
    for rule, complete in zip(short["rules"], whole["rules"], strict=True):
        for factor in ("weight", "activation") if "quantize" in rule else ():
            widths = {"bits": complete["quantize"][factor]["bits"]}
            rule["quantize"][factor] = widths | rule["quantize"].get(factor, {})
    return tomli_w.dumps(_without_nulls(short))


def part_sizes(report: CheckpointReport, manifest: Manifest) -> list[PartSize]:
    """What is stored for each part of the policy."""
    shapes = {linear.name: linear.in_features * linear.out_features for linear in manifest.plan.linears}
    sizes = []
    for part in report.parts:
        members = [linear for linear in report.linears if linear.quantized and linear.part == part]
        weights, stored = sum(shapes[each.name] for each in members), sum(each.bytes for each in members)
        share = 8 * stored / (_FP16_BITS * weights)
        sizes.append(PartSize(part, len(members), weights, _width(members), stored, share))
    return sizes


def _width(linears: Sequence[LinearReport]) -> str:
    """Every width that occurs; `W4A4` is said only of what is executed so."""
    words = dict.fromkeys(
        f"W{each.weight_bits:.3g}A{each.activation_bits}"
        if each.execution == "integer"
        else f"{each.weight_bits:.3g}-bit weights, {each.activation_bits}-bit activations ({each.execution})"
        for each in linears
    )
    return ", ".join(words)


def _judged(directory: Path, manifest: Manifest, evidence: Evaluation) -> PolicyResult:
    """What an evaluation says about this checkpoint. Raises `HubError` if it does not judge it, or judges another."""
    from omega_qvla.evaluation.results import manifest_digest

    name, digest = manifest.plan.recipe.name, manifest_digest(directory)
    policies = evidence.policies[1:]
    if same := [policy for policy in policies if policy.manifest_sha256 == digest]:
        return same[0]
    named = [policy for policy in policies if policy.label == name or policy.path == directory.name]
    if not named:
        judged = ", ".join(policy.label for policy in policies) or "nothing against a reference"
        raise HubError(f"the evaluation does not judge {directory}: it has {judged}; evaluate this checkpoint")
    if named[0].manifest_sha256 is not None:
        raise HubError(f"the evaluation judges another checkpoint called {named[0].label}; evaluate this one")
    return named[0]


def _shown(evidence: Evaluation, policy: PolicyResult) -> str:
    """The evaluation's own report of the reference and this policy, below the card's headings."""
    from omega_qvla.evaluation.report import markdown

    report = markdown(replace(evidence, policies=(evidence.reference(), policy)))
    report = re.sub("^(?=#)", "##", report, flags=re.MULTILINE)
    return report if policy.manifest_sha256 is not None else f"{_BY_NAME}\n\n{report}"


def _without_nulls(data: Any) -> Any:
    """TOML has no null: what is absent has it."""
    if isinstance(data, dict):
        return {key: _without_nulls(value) for key, value in data.items() if value is not None}
    return [_without_nulls(value) for value in data] if isinstance(data, list) else data
