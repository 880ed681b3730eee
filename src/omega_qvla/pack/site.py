"""What quantization produces and a running policy consumes: packed linears around one input."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from omega_qvla.spec import LinearSpec, Part

SITE_TENSORS = ("permutation", "rotation", "smoothing", "folded", "step_scale")
"""Tensors of a site in the order in which they act; stored as `<site>.<tensor>` where present."""


@dataclass(frozen=True)
class PackedLinear:
    """One quantized weight."""

    name: str
    packed: Tensor
    """uint8 [out, in · bits / 8]"""
    scale: Tensor
    """bfloat16 [out, groups]"""
    bias: Tensor | None = None
    """As in the source checkpoint, [out]."""


@dataclass(frozen=True)
class PackedSite:
    """The linears that read one input, and what happens to that input."""

    name: str
    part: Part
    in_features: int
    spec: LinearSpec
    linears: tuple[PackedLinear, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Of SITE_TENSORS: permutation int32 [in], rotation bfloat16 [in / c, c, c], smoothing and folded float32
    [in], step_scale float32 [steps, in or 1]."""
