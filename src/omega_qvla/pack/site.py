"""What quantization produces and a running policy consumes: packed linears around one input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from omega_qvla.spec import LinearSpec, Part

SITE_TENSORS = ("smoothing", "first_rotation", "permutation", "rotation", "folded", "step_scale")
"""Tensors of a site in the order in which they act; stored as `<site>.<tensor>` where present."""
LINEAR_TENSORS = ("widths", "low_rank_down", "low_rank_up", "output_rotation")
"""Tensors of a linear besides codes, scales and bias; stored as `<linear>.<tensor>` where present."""


@dataclass(frozen=True)
class PackedLinear:
    """One quantized weight."""

    name: str
    packed: Tensor
    """uint8 [out, in · bits / 8]; [bytes] where rows have widths of their own (`pack.rows`)"""
    scale: Tensor
    """bfloat16 [out, groups]"""
    bias: Tensor | None = None
    """As in the source checkpoint, [out]."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Of LINEAR_TENSORS: widths uint8 [out]; low_rank_down bfloat16 [rank, in], low_rank_up bfloat16 [out, rank];
    output_rotation bfloat16 [out / c, c, c], by which the product is multiplied."""


@dataclass(frozen=True)
class PackedSite:
    """The linears that read one input, and what happens to that input."""

    name: str
    part: Part
    in_features: int
    spec: LinearSpec
    linears: tuple[PackedLinear, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Of SITE_TENSORS: permutation int32 [in], both rotations bfloat16 [in / c, c, c], smoothing and folded float32
    [in], step_scale float32 [steps, in or 1]."""


def tensors_of(sites: Iterable[PackedSite]) -> dict[str, Tensor]:
    """Every tensor of packed sites by the name under which it is stored."""
    tensors: dict[str, Tensor] = {}
    for site in sites:
        tensors |= {f"{site.name}.{key}": value for key, value in site.tensors.items()}
        for linear in site.linears:
            tensors[f"{linear.name}.weight_packed"] = linear.packed
            tensors[f"{linear.name}.weight_scale"] = linear.scale
            if linear.bias is not None:
                tensors[f"{linear.name}.bias"] = linear.bias
            tensors |= {f"{linear.name}.{key}": value for key, value in linear.tensors.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def site_from(
    tensors: Mapping[str, Tensor], name: str, part: Part, in_features: int, spec: LinearSpec, linears: Iterable[str]
) -> PackedSite:
    """The packed site that `tensors_of` took apart. Raises `KeyError` for a linear without codes or scales."""

    def present(owner: str, keys: tuple[str, ...]) -> dict[str, Tensor]:
        return {key: tensors[f"{owner}.{key}"] for key in keys if f"{owner}.{key}" in tensors}

    packed = tuple(
        PackedLinear(
            linear,
            tensors[f"{linear}.weight_packed"],
            tensors[f"{linear}.weight_scale"],
            tensors.get(f"{linear}.bias"),
            present(linear, LINEAR_TENSORS),
        )
        for linear in linears
    )
    return PackedSite(name, part, in_features, spec, packed, present(name, SITE_TENSORS))
