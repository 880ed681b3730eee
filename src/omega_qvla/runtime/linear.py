"""The quantized linear layer, and the input that several of them share.

One function, several ways to compute it. `integer` multiplies codes as int8 with int32 accumulators;
`simulated` does the same sums in floating point, exactly. Scales per input channel cannot be applied to an
integer accumulator: linears with such scales are only ever simulated, on dequantized tensors. Where inputs or
weights are not rounded, the other factor is dequantized.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from omega_qvla.numerics.quantizer import peak_scale, quantize
from omega_qvla.numerics.rotation import apply_blocks
from omega_qvla.numerics.transform import Transform, times
from omega_qvla.pack.site import PackedLinear, PackedSite
from omega_qvla.runtime.step import CurrentStep
from omega_qvla.runtime.weight import Operand, Weight, prepare_weight

Execution = Literal["integer", "simulated"]


class QuantizedInput(nn.Module):
    """Transforms and rounds the input of one site, once for all linears that read it."""

    order: Tensor | None
    """int64 [in]; None if channels keep their order"""
    before: Tensor | None
    """float32 [in] or [in / c, c, c], what acts before the channels are put in order; None if nothing does"""
    after: Tensor | None
    """The same, for what acts afterwards."""
    step_scale: Tensor | None
    """float32 [steps or 1, in or 1]; None if scales are dynamic"""

    def __init__(self, site: PackedSite, step: CurrentStep) -> None:
        super().__init__()
        self.name, self.spec, self.step = site.name, site.spec.activation, step
        stages = site_transform(site).stages(site.in_features)
        self.register_buffer("order", stages.order, persistent=False)
        self.register_buffer("before", _float(stages.before), persistent=False)
        self.register_buffer("after", _float(stages.after), persistent=False)
        self.register_buffer("step_scale", site.tensors.get("step_scale"), persistent=False)
        self._latest: tuple[weakref.ref[Tensor], tuple[int, int], Operand] | None = None

    def forward(self, x: Tensor) -> Operand:
        """What the linears multiply for x [..., in].

        Asked again for the same tensor, as the next linear of the site does, it answers from memory.

        Raises `StepError` if scales are per step and none is running, `ValueError` if x is not finite.
        """
        row = self.step.current if self.spec.mode == "per_step" and self.spec.rounds else 0
        remembers = not x.is_inference()  # an inference tensor does not tell whether it was modified
        if remembers and self._latest is not None:
            latest, state, result = self._latest
            if latest() is x and state == (x._version, row):
                return result
        result = self._round(self.transform(x.flatten(0, -2).float()), row)
        if remembers:
            self._latest = (weakref.ref(x), (x._version, row), result)
        return result

    def transform(self, x: Tensor) -> Tensor:
        """X' [tokens, in] of X [tokens, in]."""
        if self.before is not None:
            x = times(x, self.before)
        if self.order is not None:
            x = x[:, self.order]
        return x if self.after is None else times(x, self.after)

    def _round(self, x: Tensor, row: int) -> Operand:
        if not self.spec.rounds:
            scale = None
        elif self.step_scale is None:
            scale = peak_scale(x, self.spec.bits, self.spec.group_size)
        else:
            scale = self.step_scale[row : row + 1]
        # A dynamic scale is finite only if all of x is, and there are far fewer of them.
        if not (scale if scale is not None and self.step_scale is None else x).isfinite().all():
            raise ValueError(f"the input of {self.name} contains NaN or infinity")
        if scale is None:
            return Operand(x, None, None)
        return Operand(x, quantize(x, scale, self.spec.bits, self.spec.codes), scale)


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b on codes. Holds the packed weight and what its execution needs, no floating-point copy of a
    weight that an integer product can take."""

    packed: Tensor
    """uint8 [out, in · bits / 8], or [bytes] where rows have widths of their own"""
    scale: Tensor
    """bfloat16 [out, groups]"""
    bias: Tensor | None
    low_rank_down: Tensor | None
    """float32 [rank, in]"""
    low_rank_up: Tensor | None
    """float32 [out, rank]"""
    output_rotation: Tensor | None
    """float32 [out / c, c, c]"""

    def __init__(self, linear: PackedLinear, site: PackedSite, source: QuantizedInput, execution: Execution) -> None:
        super().__init__()
        self.name = linear.name
        self.in_features, self.out_features = site.in_features, len(linear.scale)
        best = site.spec.execution
        self.execution = execution if best == "integer" else best
        self.dtype = torch.float32
        self.register_buffer("packed", linear.packed, persistent=False)
        self.register_buffer("scale", linear.scale, persistent=False)
        self.register_buffer("bias", linear.bias, persistent=False)
        for name in ("low_rank_down", "low_rank_up", "output_rotation"):
            self.register_buffer(name, _float(linear.tensors.get(name)), persistent=False)
        self.source = source
        self._weight: Weight = prepare_weight(linear, site, self.execution)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight that this layer stands for, without its values: model code asks for them."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def operand_bytes(self) -> int:
        """Memory of what the execution holds besides the packed weight: unpacked codes, or dequantized values."""
        return self._weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        operand: Operand = self.source(x)
        y = self._weight.product(operand)
        if self.low_rank_down is not None and self.low_rank_up is not None:
            y += operand.values @ self.low_rank_down.t() @ self.low_rank_up.t()
        if self.output_rotation is not None:
            y = apply_blocks(y, self.output_rotation)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        bits = 8 * self.packed.numel() / (self.in_features * self.out_features)
        return f"in={self.in_features}, out={self.out_features}, bits={bits:g}, execution={self.execution}"


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
        spec.first_rotation,
        stored.get("first_rotation"),
    )


def install(
    model: nn.Module, sites: list[PackedSite], step: CurrentStep, execution: Execution
) -> dict[str, nn.Module]:
    """Replace the linears of `sites` in `model` by quantized ones; returns those replaced, by name.

    Raises `AttributeError` for an unknown name.
    """
    replaced: dict[str, nn.Module] = {}
    for site in sites:
        source = QuantizedInput(site, step)
        for linear in site.linears:
            original = model.get_submodule(linear.name)
            quantized = QuantizedLinear(linear, site, source, execution)
            dtype = original.weight.dtype
            assert isinstance(dtype, torch.dtype)
            quantized.dtype = dtype
            _put(model, linear.name, quantized)
            replaced[linear.name] = original
    return replaced


@contextmanager
def installed(
    model: nn.Module, sites: list[PackedSite], step: CurrentStep, execution: Execution = "simulated"
) -> Iterator[None]:
    """While open, the linears of `sites` in `model` are quantized ones; then the model is as it was before."""
    replaced = install(model, sites, step, execution)
    try:
        yield
    finally:
        for name, module in replaced.items():
            _put(model, name, module)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
