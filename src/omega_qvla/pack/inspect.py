"""What a checkpoint consists of, measured on its files."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from omega_qvla.pack.checkpoint import verify
from omega_qvla.pack.manifest import KEPT_FILE, MANIFEST_FILE, QUANTIZED_FILE, Manifest, Plan, PlannedLinear
from omega_qvla.pack.site import LINEAR_TENSORS
from omega_qvla.pack.stream import sources_in
from omega_qvla.spec import ActivationSpec, WeightSpec

FP16_BYTES = 2


@dataclass(frozen=True)
class LinearReport:
    """One linear of the policy."""

    name: str
    part: str
    quantized: bool
    because: str
    """The recipe's rule, or the reason to keep it."""
    weight_bits: float | None
    """Measured on the codes: the mean where rows have widths of their own."""
    activation_bits: int | None
    granularity: str
    """Of weights and of activations, such as `group 64 / token_group 64`."""
    execution: str
    """`integer`, `dequantized` (one factor is not rounded), `simulated` (the scales cannot be executed on integers)
    or `float`."""
    bytes: int
    """Of codes and scales, or of the kept weight; biases included."""


@dataclass(frozen=True)
class PartReport:
    """The quantized linears of one part of the policy."""

    linears: int
    weights: int
    """Biases aside."""


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint line by line; all bytes are measured on the files."""

    directory: str
    recipe: str
    execution: str
    linears: list[LinearReport]
    quantized_linears: int
    kept_linears: int
    parts: dict[str, PartReport]
    """By vision, language and action."""
    codes_bytes: int
    """Rows of 16 bits and the width of every row included, where rows have widths of their own."""
    scales_bytes: int
    fp16_bytes: int
    """What the quantized linears' weights take at 16 bits."""
    codes_and_scales_share: float
    """(codes + scales) / fp16."""
    rotation_bytes: int
    permutation_bytes: int
    factor_bytes: int
    """Smoothing and folded factors per channel."""
    step_table_bytes: int
    low_rank_bytes: int
    quantized_bytes: int
    """All that is stored for the quantized linears, their biases aside: codes, scales and what follows them here."""
    quantized_share: float
    """quantized / fp16; the rest is what quantization saves of these linears."""
    kept_bytes: int
    """Tensors in floating point, biases of quantized linears included."""
    kept_by_module: dict[str, int]
    """The same by where it stands in the policy, largest first: a module's name, or what comes before the first
    number in it, so that a stack of layers is one entry."""
    total_bytes: int
    """Of all files."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def inspect(directory: Path) -> CheckpointReport:
    """Verify a checkpoint and account for its bytes. Raises `CheckpointError` as reading it does."""
    manifest = verify(directory)
    quantized, kept = _sizes(directory / QUANTIZED_FILE), _sizes(directory / KEPT_FILE)
    plan = manifest.plan
    linears = [_linear(plan, linear, quantized, kept) for linear in plan.linears]
    codes, scales = _ending(quantized, "weight_packed", "widths"), _ending(quantized, "weight_scale")
    fp16 = sum(FP16_BYTES * x.in_features * x.out_features for x in plan.linears if x.site is not None)
    biases = {name: size for name, size in quantized.items() if name.endswith(".bias")}
    in_floating_point = kept | biases
    kept_bytes = sum(in_floating_point.values())
    quantized_bytes = sum(quantized.values()) - sum(biases.values())
    return CheckpointReport(
        directory=str(directory),
        recipe=plan.recipe.name,
        execution=plan.recipe.execution,
        linears=linears,
        quantized_linears=sum(linear.quantized for linear in linears),
        kept_linears=sum(not linear.quantized for linear in linears),
        parts=planned_parts(plan),
        codes_bytes=codes,
        scales_bytes=scales,
        fp16_bytes=fp16,
        codes_and_scales_share=(codes + scales) / fp16 if fp16 else 0.0,
        rotation_bytes=_ending(quantized, "first_rotation", "rotation", "output_rotation"),
        permutation_bytes=_ending(quantized, "permutation"),
        factor_bytes=_ending(quantized, "smoothing", "folded"),
        step_table_bytes=_ending(quantized, "step_scale"),
        low_rank_bytes=_ending(quantized, "low_rank_down", "low_rank_up"),
        quantized_bytes=quantized_bytes,
        quantized_share=quantized_bytes / fp16 if fp16 else 0.0,
        kept_bytes=kept_bytes,
        kept_by_module=_by_module(in_floating_point),
        total_bytes=_total_bytes(directory, manifest),
    )


def planned_parts(plan: Plan) -> dict[str, PartReport]:
    """What a plan quantizes, by part."""
    quantized = [linear for linear in plan.linears if linear.site is not None]
    parts = dict.fromkeys(linear.part or "other" for linear in quantized)
    of_part = {part: [linear for linear in quantized if (linear.part or "other") == part] for part in parts}
    return {
        part: PartReport(len(members), sum(each.in_features * each.out_features for each in members))
        for part, members in of_part.items()
    }


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, from its header."""
    return {name: source.nbytes for name, source in sources_in(path).items()}


def _by_module(sizes: dict[str, int]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, size in sizes.items():
        module = name.rpartition(".")[0] or name
        found[re.split(r"\.\d+(?:\.|$)", module)[0]] += size
    return dict(found.most_common())


def _ending(sizes: dict[str, int], *leaves: str) -> int:
    return sum(size for name, size in sizes.items() if name.rpartition(".")[2] in leaves)


def _linear(plan: Plan, linear: PlannedLinear, quantized: dict[str, int], kept: dict[str, int]) -> LinearReport:
    part = linear.part or "other"
    if linear.site is None:
        size = kept.get(f"{linear.name}.weight", 0) + kept.get(f"{linear.name}.bias", 0)
        return LinearReport(linear.name, part, False, linear.kept_because or "", None, None, "", "float", size)
    site = next(site for site in plan.sites if site.name == linear.site)
    spec = plan.spec(site)
    leaves = ("weight_packed", "weight_scale", "bias", *LINEAR_TENSORS)
    codes = quantized[f"{linear.name}.weight_packed"]
    return LinearReport(
        name=linear.name,
        part=part,
        quantized=True,
        because=f"rule {site.rule} of {plan.recipe.name}",
        weight_bits=8 * codes / (linear.in_features * linear.out_features),
        activation_bits=spec.activation.bits,
        granularity=f"{_weight_granularity(spec.weight)} / {_activation_granularity(spec.activation)}",
        execution=spec.execution,
        bytes=sum(quantized.get(f"{linear.name}.{leaf}", 0) for leaf in leaves),
    )


def _weight_granularity(spec: WeightSpec) -> str:
    return "output channel" if spec.group_size is None else f"group {spec.group_size}"


def _activation_granularity(spec: ActivationSpec) -> str:
    if not spec.rounds:
        return "none"
    return f"{spec.mode} {spec.granularity} {spec.group_size or ''}".strip()


def _total_bytes(directory: Path, manifest: Manifest) -> int:
    manifest_bytes = (directory / MANIFEST_FILE).stat().st_size
    return manifest_bytes + sum(record.bytes for record in manifest.files.values())
