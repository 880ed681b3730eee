"""The quantized linear layer, and the input that several of them share.

One function, two ways to execute it. `integer` multiplies 4-bit codes as int8 with int32 accumulators;
`simulated` does the same sums in floating point, exactly. Scales per input channel cannot be applied to an
integer accumulator: linears with such scales are only ever simulated, on dequantized tensors.
"""

from __future__ import annotations

import weakref
from typing import Literal

import torch
from torch import Tensor, nn

from omega_qvla.kernels.grouped_matmul import GroupedWeight
from omega_qvla.numerics.quantizer import dequantize, peak_scale, quantize
from omega_qvla.numerics.rotation import apply_blocks
from omega_qvla.numerics.transform import Transform
from omega_qvla.pack.bits import unpack
from omega_qvla.pack.site import PackedLinear, PackedSite
from omega_qvla.runtime.step import DenoisingStep

Execution = Literal["integer", "simulated"]


class QuantizedInput(nn.Module):
    """Transforms and rounds the input of one site, once for all linears that read it."""

    order: Tensor | None
    """int64 [in]; None if channels keep their order"""
    blocks: Tensor | None
    """float32 [in / c, c, c]; None if nothing but the permutation acts"""
    step_scale: Tensor | None
    """float32 [steps or 1, in or 1]; None if scales are dynamic"""

    def __init__(self, site: PackedSite, step: DenoisingStep) -> None:
        super().__init__()
        self.name, self.spec, self.step = site.name, site.spec.activation, step
        transform = site_transform(site)
        plain = transform.rotation == "none" and transform.smoothing is None and transform.folded is None
        order = None if transform.permutation is None else transform.permutation.long()
        self.register_buffer("order", order, persistent=False)
        blocks = None if plain else transform.blocks(site.in_features).float().contiguous()
        self.register_buffer("blocks", blocks, persistent=False)
        self.register_buffer("step_scale", site.tensors.get("step_scale"), persistent=False)
        self._latest: tuple[weakref.ref[Tensor], tuple[int, int], tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [tokens, in] and scales float32 [tokens or 1, groups or in] of x [..., in].

        Asked again for the same tensor, as the next linear of the site does, it answers from memory.

        Raises `StepError` if scales are per step and none is running, `ValueError` if x is not finite.
        """
        row = self.step.current if self.spec.mode == "per_step" else 0
        remembers = not x.is_inference()  # an inference tensor does not tell whether it was modified
        if remembers and self._latest is not None:
            latest, state, result = self._latest
            if latest() is x and state == (x._version, row):
                return result
        result = self._quantize(self.transform(x.flatten(0, -2).float()), row)
        if remembers:
            self._latest = (weakref.ref(x), (x._version, row), result)
        return result

    def transform(self, x: Tensor) -> Tensor:
        """X' [tokens, in] of X [tokens, in]."""
        if self.order is not None:
            x = x[:, self.order]
        return x if self.blocks is None else apply_blocks(x, self.blocks)

    def _quantize(self, x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        if self.step_scale is None:
            scale = peak_scale(x, self.spec.bits, self.spec.group_size)
        else:
            scale = self.step_scale[row : row + 1]
        if not (x if self.step_scale is not None else scale).isfinite().all():
            raise ValueError(f"the input of {self.name} contains NaN or infinity")
        return quantize(x, scale, self.spec.bits), scale


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b on codes. Holds the packed weight and what its execution needs, no floating-point copy."""

    packed: Tensor
    """uint8 [out, in · bits / 8]"""
    scale: Tensor
    """bfloat16 [out, groups]"""
    bias: Tensor | None

    def __init__(self, linear: PackedLinear, site: PackedSite, source: QuantizedInput, execution: Execution) -> None:
        super().__init__()
        self.name, self.bits = linear.name, site.spec.weight.bits
        self.in_features, self.out_features = site.in_features, len(linear.scale)
        self.execution: Execution = execution if site.spec.executable else "simulated"
        self.dtype = torch.float32
        self.register_buffer("packed", linear.packed, persistent=False)
        self.register_buffer("scale", linear.scale, persistent=False)
        self.register_buffer("bias", linear.bias, persistent=False)
        self.source = source
        codes = unpack(linear.packed, self.bits)
        if site.spec.executable:
            groups = site.in_features // (site.spec.activation.group_size or site.in_features)
            groups = max(groups, linear.scale.shape[1])
            self._weight: GroupedWeight | Tensor = GroupedWeight(codes, linear.scale, groups, self.execution)
        else:
            self._weight = dequantize(codes, linear.scale.float())

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight that this layer stands for, without its values: model code asks for them."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def operand_bytes(self) -> int:
        """Memory of what the execution holds besides the packed weight: unpacked codes, or simulated values."""
        return self._weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = self.source(x)
        if isinstance(self._weight, GroupedWeight):
            y = self._weight.matmul(codes, scale)
        else:
            y = dequantize(codes, scale) @ self._weight.t()
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.bits}, execution={self.execution}"


def site_transform(site: PackedSite) -> Transform:
    """The transform of a site from its stored tensors."""
    spec, stored = site.spec.transform, site.tensors
    return Transform(
        spec.block_size,
        spec.rotation,
        stored.get("permutation"),
        stored.get("rotation"),
        stored.get("smoothing"),
        stored.get("folded"),
    )


def install(model: nn.Module, sites: list[PackedSite], step: DenoisingStep, execution: Execution) -> None:
    """Replace the linears of `sites` in `model` by quantized ones. Raises `AttributeError` for an unknown name."""
    for site in sites:
        source = QuantizedInput(site, step)
        for linear in site.linears:
            parent, _, leaf = linear.name.rpartition(".")
            owner = model.get_submodule(parent)
            quantized = QuantizedLinear(linear, site, source, execution)
            quantized.dtype = getattr(owner, leaf).weight.dtype
            setattr(owner, leaf, quantized)
