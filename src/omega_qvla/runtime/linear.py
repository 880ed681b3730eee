"""The quantized linear layer.

One function, several ways to compute it. `integer` multiplies codes as integers with int32 accumulators;
`simulated` does the same sums in floating point, exactly. Scales per input channel cannot be applied to an
integer accumulator: linears with such scales are only ever simulated, on dequantized tensors. Where inputs or
weights are not rounded, the other factor is dequantized.

Compiled kernels multiply what is stored, laid out anew. What torch multiplies takes several times that memory: it is
prepared once and kept, or prepared at each call and dropped, which costs time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from omega_qvla.numerics.rotation import apply_blocks
from omega_qvla.pack.site import PackedLinear, PackedSite
from omega_qvla.runtime.input import QuantizedInput
from omega_qvla.runtime.step import CurrentStep
from omega_qvla.runtime.weight import Execution, Operand, Weight, arithmetic_of, as_float, compiled, prepare_weights


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b on codes. Holds no floating-point copy of a weight that an integer product can take."""

    packed: Tensor | None
    """uint8 [out, in · bits / 8], or [bytes] where rows have widths of their own; None if compiled kernels have it in
    their own layout"""
    scale: Tensor | None
    """bfloat16 [out, groups]"""
    bias: Tensor | None
    low_rank_down: Tensor | None
    """[rank, in], as all of the following in float32, or as stored if unpacked weights are not kept"""
    low_rank_up: Tensor | None
    """[out, rank]"""
    output_rotation: Tensor | None
    """[out / c, c, c]"""

    def __init__(
        self,
        linear: PackedLinear,
        site: PackedSite,
        source: QuantizedInput,
        weight: Weight,
        execution: Execution,
        *,
        keep_unpacked: bool = True,
    ) -> None:
        """`weight`: what `execution` multiplies. `keep_unpacked`: whether low-rank branch and output rotation are
        kept in float32."""
        super().__init__()
        self.name = linear.name
        self.in_features, self.out_features = site.in_features, len(linear.scale)
        self.execution = arithmetic_of(site.spec, execution)
        self.dtype = torch.float32
        self.bits = 8 * linear.packed.numel() / (self.in_features * self.out_features)
        stored = not compiled(self.execution)
        self.register_buffer("packed", linear.packed if stored else None, persistent=False)
        self.register_buffer("scale", linear.scale if stored else None, persistent=False)
        self.register_buffer("bias", linear.bias, persistent=False)
        for name in ("low_rank_down", "low_rank_up", "output_rotation"):
            tensor = linear.tensors.get(name)
            self.register_buffer(name, as_float(tensor) if keep_unpacked else tensor, persistent=False)
        self.source = source
        self._read = source.forward  # without hooks: a small policy calls hundreds of linears in a chunk
        self._weight = weight
        self._runs_again = site.part == "action"
        self._corrected = any(getattr(self, name) is not None for name in ("low_rank_up", "output_rotation", "bias"))

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight that this layer stands for, without its values: model code asks for them."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def operand_bytes(self) -> int:
        """Memory of what is kept for the execution besides the packed weight, or instead of it: codes, or
        dequantized values."""
        return self._weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in].

        Asked for the very same tensor in another denoising step, as the projections of a context are, it answers from
        memory; when that tensor dies, the answer does.
        """
        operand = self._read(x)
        known = operand.answers.get(self.name)
        if known is not None and known[0]._version == known[1]:
            return known[0].clone()
        y = self._weight.product(operand)
        if y.dim() != x.dim():
            y = y.view(*x.shape[:-1], self.out_features)
        if self._corrected:
            y = self._correct(y, operand)
        if y.dtype != x.dtype:
            y = y.to(x.dtype)
        if self._runs_again and not y.is_inference():
            operand.answers[self.name] = y, y._version
        return y

    def _correct(self, y: Tensor, operand: Operand) -> Tensor:
        """What is in floating point besides the product on codes: low-rank branch, output rotation, bias."""
        down, up, back = (as_float(held) for held in (self.low_rank_down, self.low_rank_up, self.output_rotation))
        if down is not None and up is not None:
            assert operand.values is not None
            y += (operand.values @ down.t() @ up.t()).view(y.shape)
        if back is not None:
            y = apply_blocks(y, back)
        if self.bias is not None:
            y += self.bias
        return y

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.bits:g}, execution={self.execution}"


def quantized_linears(
    site: PackedSite, step: CurrentStep, execution: Execution, *, keep_unpacked: bool = True
) -> list[QuantizedLinear]:
    """The linears of a site, in their order, around the input that they share; `keep_unpacked` as for `install`."""
    arithmetic = arithmetic_of(site.spec, execution)
    weights = prepare_weights(site, arithmetic, keep_unpacked=keep_unpacked)
    if compiled(arithmetic):
        site = _without_files(site)
    source = QuantizedInput(site, step, keep_unpacked=keep_unpacked)
    return [
        QuantizedLinear(linear, site, source, weight, execution, keep_unpacked=keep_unpacked)
        for linear, weight in zip(site.linears, weights, strict=True)
    ]


def install(
    model: nn.Module,
    sites: Iterable[PackedSite],
    step: CurrentStep,
    execution: Execution,
    *,
    keep_unpacked: bool = True,
) -> dict[str, nn.Module]:
    """Replace the linears of `sites` in `model` by quantized ones; returns those replaced, by name.

    `keep_unpacked`: whether what they multiply is prepared once and kept, which takes `unpacked_bytes` of memory,
    or prepared at each call, which takes time. The results are the same bit for bit.

    Raises `AttributeError` for an unknown name.
    """
    replaced: dict[str, nn.Module] = {}
    for site in sites:
        for quantized in quantized_linears(site, step, execution, keep_unpacked=keep_unpacked):
            original = model.get_submodule(quantized.name)
            dtype = original.weight.dtype
            assert isinstance(dtype, torch.dtype)
            quantized.dtype = dtype
            _put(model, quantized.name, quantized)
            replaced[quantized.name] = original
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


def _without_files(site: PackedSite) -> PackedSite:
    """A site whose small tensors are copies: they would keep the file mapped whose weights were laid out anew."""

    def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor.clone() for key, tensor in tensors.items()}

    linears = tuple(
        replace(each, bias=None if each.bias is None else each.bias.clone(), tensors=copied(each.tensors))
        for each in site.linears
    )
    return replace(site, linears=linears, tensors=copied(site.tensors))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
