"""The quantized linear layer, and the input that several of them share.

One function, several ways to compute it. `integer` multiplies codes as int8 with int32 accumulators;
`simulated` does the same sums in floating point, exactly. Scales per input channel cannot be applied to an
integer accumulator: linears with such scales are only ever simulated, on dequantized tensors. Where inputs or
weights are not rounded, the other factor is dequantized.

What is multiplied takes several times the memory of what is stored. It is prepared once and kept, or prepared
at each call and dropped: that costs time, and the policy then takes no more memory than its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from omega_qvla.numerics.quantizer import peak_scale, quantize
from omega_qvla.numerics.rotation import apply_blocks
from omega_qvla.numerics.transform import Stages, Transform
from omega_qvla.pack.site import PackedLinear, PackedSite
from omega_qvla.runtime.step import CurrentStep
from omega_qvla.runtime.weight import Execution, Operand, PackedWeight, Weight, arithmetic_of, prepare_weight


class QuantizedInput(nn.Module):
    """Transforms and rounds the input of one site, once for all linears that read it."""

    step_scale: Tensor | None
    """float32 [steps or 1, in or 1]; None if scales are dynamic"""

    def __init__(self, site: PackedSite, step: CurrentStep, *, keep_unpacked: bool = True) -> None:
        """`keep_unpacked`: whether the transform is kept as it runs, in float32, or only as it is stored."""
        super().__init__()
        self.name, self.spec, self.step = site.name, site.spec.activation, step
        self._site = site
        self._stages = _float_stages(site) if keep_unpacked else None
        held = site.tensors if self._stages is None else vars(self._stages)
        for name, tensor in {**held, "step_scale": site.tensors.get("step_scale")}.items():
            self.register_buffer(name, tensor, persistent=False)
        self._latest = WeakTensorKeyDictionary()

    def forward(self, x: Tensor) -> Operand:
        """What the linears multiply for x [..., in].

        Asked again for the same tensor, as the next linear of the site does, it answers from memory; when that
        tensor dies, the answer does.

        Raises `StepError` if scales are per step and none is running, `ValueError` if x is not finite.
        """
        row = self.step.current if self.spec.mode == "per_step" and self.spec.rounds else 0
        if x.is_inference():  # it does not tell whether it was modified
            return self._operand(x, row)
        state = (x._version, row)
        latest: tuple[tuple[int, int], Operand] | None = self._latest.get(x)
        if latest is None or latest[0] != state:
            latest = state, self._operand(x, row)
            self._latest.clear()
            self._latest[x] = latest
        return latest[1]

    def transform(self, x: Tensor) -> Tensor:
        """X' [tokens, in] of X [tokens, in]."""
        stages = _float_stages(self._site) if self._stages is None else self._stages
        return stages.apply(x)

    def _operand(self, x: Tensor, row: int) -> Operand:
        values = self.transform(x.flatten(0, -2).float())
        if values.data_ptr() == x.data_ptr():  # what is remembered would keep x alive, and with it itself
            values = values.clone()
        return self._round(values, row)

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
    """y = x Wᵀ + b on codes. Holds the packed weight and, if it is to be kept, what its execution multiplies; no
    floating-point copy of a weight that an integer product can take."""

    packed: Tensor
    """uint8 [out, in · bits / 8], or [bytes] where rows have widths of their own"""
    scale: Tensor
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
        execution: Execution,
        *,
        keep_unpacked: bool = True,
    ) -> None:
        """`keep_unpacked`: whether what the execution multiplies is prepared once and kept, or at each call."""
        super().__init__()
        self.name = linear.name
        self.in_features, self.out_features = site.in_features, len(linear.scale)
        self.execution = arithmetic_of(site.spec, execution)
        self.dtype = torch.float32
        self.register_buffer("packed", linear.packed, persistent=False)
        self.register_buffer("scale", linear.scale, persistent=False)
        self.register_buffer("bias", linear.bias, persistent=False)
        for name in ("low_rank_down", "low_rank_up", "output_rotation"):
            stored = linear.tensors.get(name)
            self.register_buffer(name, _float(stored) if keep_unpacked else stored, persistent=False)
        self.source = source
        prepare = prepare_weight if keep_unpacked else PackedWeight
        self._weight: Weight = prepare(linear, site, self.execution)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight that this layer stands for, without its values: model code asks for them."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def operand_bytes(self) -> int:
        """Memory of what is kept for the execution besides the packed weight: unpacked codes, or dequantized
        values."""
        return self._weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        operand: Operand = self.source(x)
        y = self._weight.product(operand)
        down, up, back = (_float(held) for held in (self.low_rank_down, self.low_rank_up, self.output_rotation))
        if down is not None and up is not None:
            y += operand.values @ down.t() @ up.t()
        if back is not None:
            y = apply_blocks(y, back)
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
        source = QuantizedInput(site, step, keep_unpacked=keep_unpacked)
        for linear in site.linears:
            original = model.get_submodule(linear.name)
            quantized = QuantizedLinear(linear, site, source, execution, keep_unpacked=keep_unpacked)
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


def _float_stages(site: PackedSite) -> Stages:
    """How a site's transform runs, factors and matrices in float32."""
    stages = site_transform(site).stages(site.in_features)
    return Stages(_float(stages.before), stages.order, _float(stages.after))


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
