"""The input that several quantized linears share: transformed and rounded once for all of them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from omega_qvla.kernels import native
from omega_qvla.kernels.native import NativeInput, RoundedInput
from omega_qvla.numerics.quantizer import peak_scale, qmax, qmin, quantize
from omega_qvla.numerics.rotation import hadamard_transform
from omega_qvla.numerics.transform import Stages, Transform, times
from omega_qvla.pack.site import PackedSite
from omega_qvla.runtime.step import CurrentStep
from omega_qvla.runtime.weight import Operand, as_float, flushes


class QuantizedInput(nn.Module):
    """Transforms and rounds the input of one site, once for all linears that read it.

    Where kernels were compiled, they do it on the CPU for every execution, so that all see the same codes.
    """

    step_scale: Tensor | None
    """float32 [steps or 1, in or 1]; None if scales are dynamic"""

    def __init__(self, site: PackedSite, step: CurrentStep, *, keep_unpacked: bool = True) -> None:
        """`keep_unpacked`: whether a transform that torch computes is kept as it runs, in float32, or only as it is
        stored. Compiled kernels take it as it is stored."""
        super().__init__()
        self.name, self.spec, self.step = site.name, site.spec.activation, step
        self._by_step = self.spec.mode == "per_step" and self.spec.rounds
        self._fixed = "step_scale" in site.tensors
        self._transform, self._channels = site_transform(site), site.in_features
        self._compiled = _CompiledInput(site) if native.available() else None
        keep = keep_unpacked and self._compiled is None
        self._stages = _float_stages(self._transform, self._channels) if keep else None
        held = site.tensors if self._stages is None else self._stages.tensors
        for name, tensor in {**held, "step_scale": site.tensors.get("step_scale")}.items():
            self.register_buffer(name, tensor, persistent=False)
        self._latest = _Latest()

    def forward(self, x: Tensor) -> Operand:
        """What the linears multiply for x [..., in].

        Asked again for the same tensor, as the next linear of the site does, it answers from memory; when that
        tensor dies, the answer does.

        Raises `StepError` if scales are per step and none is running, `ValueError` if x is not finite.
        """
        row = self.step.current if self._by_step else 0
        if x.is_inference():  # it does not tell whether it was modified
            return self._operand(x, row)
        operand = self._latest.recall(x, row)
        if operand is None:
            operand = self._operand(x, row)
            self._latest.remember(x, row, operand)
        return operand

    def transform(self, x: Tensor) -> Tensor:
        """X' float32 [tokens, in] of X [tokens, in]. Raises `ValueError` if it is not finite."""
        if self._compiled is not None:
            return self._compiled.transform(x)
        stages = _float_stages(self._transform, self._channels) if self._stages is None else self._stages
        return stages.apply(x.float())

    def _operand(self, x: Tensor, row: int) -> Operand:
        scale = self.step_scale[row : row + 1] if self._fixed and self.step_scale is not None else None
        if self._compiled is not None and self._compiled.rounds:
            return Operand.of_compiled(self._compiled.round(x, scale))
        values = self.transform(x.detach().flatten(0, -2))
        if values.data_ptr() == x.data_ptr():  # what is remembered would keep x alive, and with it itself
            values = values.clone()
        return self._round(values, scale)

    def _round(self, x: Tensor, scale: Tensor | None) -> Operand:
        dynamic = self.spec.rounds and scale is None
        if dynamic:
            scale = peak_scale(x, self.spec.bits, self.spec.group_size)
        # A dynamic scale is finite only if all of x is, and there are far fewer of them.
        if not (scale if scale is not None and dynamic else x).isfinite().all():
            raise ValueError(f"the input of {self.name} contains NaN or infinity")
        if not self.spec.rounds or scale is None:
            return Operand(x, None, None)
        return Operand(x, quantize(x, scale, self.spec.bits, self.spec.codes), scale)


class _Latest:
    """What was made of a tensor, as long as that lives and is not modified."""

    __slots__ = ("_operand", "_row", "_tensor", "_version")

    def __init__(self) -> None:
        self._tensor: weakref.ref[Tensor] | None = None

    def recall(self, x: Tensor, row: int) -> Operand | None:
        tensor = self._tensor
        known = tensor is not None and tensor() is x and self._version == x._version and self._row == row
        return self._operand if known else None

    def remember(self, x: Tensor, row: int, operand: Operand) -> None:
        self._tensor = weakref.ref(x, self._forget)
        self._version, self._row, self._operand = x._version, row, operand

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        if self._tensor is dead:
            self._tensor = None
            del self._operand


class _CompiledInput:
    """A site's transform for the compiled kernels, which know one rotation: torch computes the one before it."""

    def __init__(self, site: PackedSite) -> None:
        whole, width, activation = site_transform(site), site.in_features, site.spec.activation
        self._first: Tensor | None = None
        smoothing = whole.smoothing
        if whole.first_rotation != "none":
            alone = replace(whole, permutation=None, rotation="none", matrices=None, folded=None)
            self._first, smoothing = as_float(alone.stages(width).before), None
        self.rounds = rounds = activation.rounds and activation.granularity != "channel"
        """Whether codes are made here, too."""
        self._values = any("low_rank_down" in linear.tensors for linear in site.linears)
        self._input = NativeInput(
            site.name,
            width,
            before=_inverse(smoothing),
            order=whole.permutation,
            rotation="hadamard" if whole.rotation == "hadamard" else whole.matrices,
            after=_inverse(whole.folded),
            block_size=whole.block_size,
            group_size=activation.group_size if rounds else None,
            flushed=width // flushes(site) if rounds else None,
            lowest=qmin(activation.bits, activation.codes) if rounds else -1,
            highest=qmax(activation.bits) if rounds else 1,
        )

    def transform(self, x: Tensor) -> Tensor:
        return self._input.transform(self._before(x))

    def round(self, x: Tensor, scale: Tensor | None) -> RoundedInput:
        return self._input.round(self._before(x), scale, values=self._values)

    def _before(self, x: Tensor) -> Tensor:
        if self._first is not None:
            return times(x.float(), self._first)
        return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


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


@dataclass(frozen=True)
class _TorchStages:
    """How a transform runs in torch: X' = (X · before)[:, order] · diag(H) · after."""

    tensors: dict[str, Tensor | None]
    """`before` and `after`: factor per channel float32 [in], or matrix per block [K, c, c]. `order`: int64 [in]."""
    hadamard: int | None
    """Channels in a block of the Hadamard rotation; None: it is none, or part of the matrices."""

    def apply(self, x: Tensor) -> Tensor:
        before, order, after = (self.tensors[name] for name in ("before", "order", "after"))
        if self.hadamard is None:
            return Stages(before, order, after).apply(x)
        x = hadamard_transform(Stages(before, order, None).apply(x), self.hadamard)
        return Stages(None, None, after).apply(x)


def _float_stages(transform: Transform, channels: int) -> _TorchStages:
    """With a Hadamard rotation the same operations in the same order as the compiled kernels: the same bits."""
    if transform.rotation == "hadamard" and transform.first_rotation == "none":
        order = None if transform.permutation is None else transform.permutation.long()
        tensors = {"before": _inverse(transform.smoothing), "order": order, "after": _inverse(transform.folded)}
        return _TorchStages(tensors, transform.block_size)
    stages = transform.stages(channels)
    return _TorchStages(
        {"before": as_float(stages.before), "order": stages.order, "after": as_float(stages.after)}, None
    )


def _inverse(divisor: Tensor | None) -> Tensor | None:
    return None if divisor is None else (1 / divisor.double()).float()
