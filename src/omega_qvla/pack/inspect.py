"""What a checkpoint consists of, measured on its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open

from omega_qvla.pack.checkpoint import KEPT_FILE, QUANTIZED_FILE, verify
from omega_qvla.pack.manifest import Manifest, Plan, PlannedLinear

_BYTES = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8, "BOOL": 1}
FP16_BYTES = 2


@dataclass(frozen=True)
class LinearReport:
    """One linear of the policy."""

    name: str
    part: str
    quantized: bool
    because: str
    """The recipe's rule, or the reason to keep it."""
    weight_bits: int | None
    activation_bits: int | None
    granularity: str
    """Of weights and of activations, such as `group 64 / token_group 64`."""
    execution: str
    """`integer`, `simulated` (the scales cannot be executed on integers) or `float`."""
    bytes: int
    """Of codes and scales, or of the kept weight; biases included."""


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint line by line; all bytes are measured on the files."""

    directory: str
    recipe: str
    execution: str
    linears: list[LinearReport]
    quantized_linears: int
    kept_linears: int
    codes_bytes: int
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
    kept_bytes: int
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
    codes, scales = _ending(quantized, "weight_packed"), _ending(quantized, "weight_scale")
    fp16 = sum(FP16_BYTES * x.in_features * x.out_features for x in plan.linears if x.site is not None)
    return CheckpointReport(
        directory=str(directory),
        recipe=plan.recipe.name,
        execution=plan.recipe.execution,
        linears=linears,
        quantized_linears=sum(linear.quantized for linear in linears),
        kept_linears=sum(not linear.quantized for linear in linears),
        codes_bytes=codes,
        scales_bytes=scales,
        fp16_bytes=fp16,
        codes_and_scales_share=(codes + scales) / fp16 if fp16 else 0.0,
        rotation_bytes=_ending(quantized, "rotation"),
        permutation_bytes=_ending(quantized, "permutation"),
        factor_bytes=_ending(quantized, "smoothing") + _ending(quantized, "folded"),
        step_table_bytes=_ending(quantized, "step_scale"),
        kept_bytes=sum(kept.values()) + _ending(quantized, "bias"),
        total_bytes=_total_bytes(directory, manifest),
    )


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, from its header."""
    sizes = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is not a mapping
            tensor = file.get_slice(name)
            elements = 1
            for size in tensor.get_shape():
                elements *= size
            sizes[name] = elements * _BYTES[tensor.get_dtype()]
    return sizes


def _ending(sizes: dict[str, int], leaf: str) -> int:
    return sum(size for name, size in sizes.items() if name.endswith(f".{leaf}"))


def _linear(plan: Plan, linear: PlannedLinear, quantized: dict[str, int], kept: dict[str, int]) -> LinearReport:
    part = linear.part or "other"
    if linear.site is None:
        size = kept.get(f"{linear.name}.weight", 0) + kept.get(f"{linear.name}.bias", 0)
        return LinearReport(linear.name, part, False, linear.kept_because or "", None, None, "", "float", size)
    site = next(site for site in plan.sites if site.name == linear.site)
    spec = plan.spec(site)
    activation = spec.activation
    granularity = f"{f'group {spec.weight.group_size}' if spec.weight.group_size else 'output channel'} / "
    granularity += f"{activation.mode} {activation.granularity} {activation.group_size or ''}".strip()
    size = sum(quantized.get(f"{linear.name}.{leaf}", 0) for leaf in ("weight_packed", "weight_scale", "bias"))
    execution = "integer" if spec.executable else "simulated"
    reason = f"rule {site.rule} of {plan.recipe.name}"
    return LinearReport(
        linear.name, part, True, reason, spec.weight.bits, activation.bits, granularity, execution, size
    )


def _total_bytes(directory: Path, manifest: Manifest) -> int:
    manifest_bytes = (directory / "manifest.json").stat().st_size
    return manifest_bytes + sum(record.bytes for record in manifest.files.values())
