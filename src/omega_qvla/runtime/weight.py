"""A packed weight made ready for one execution, and what it is multiplied with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from omega_qvla.kernels.grouped_matmul import GroupedWeight, prepared_bytes
from omega_qvla.numerics.quantizer import dequantize
from omega_qvla.pack.bits import unpack
from omega_qvla.pack.rows import rows_of, unpack_rows
from omega_qvla.pack.site import PackedLinear, PackedSite
from omega_qvla.spec import CHANNEL_WIDTHS, Arithmetic, LinearSpec

Execution = Literal["integer", "simulated"]


@dataclass(frozen=True)
class Operand:
    """The transformed input of a site and, where the recipe rounds it, its codes."""

    values: Tensor
    """X', float32 [tokens, in]"""
    codes: Tensor | None
    """int8 [tokens, in]"""
    scale: Tensor | None
    """float32 [tokens or 1, groups or in]"""

    @cached_property
    def rounded(self) -> Tensor:
        """What the codes stand for, float32 [tokens, in]; X' itself where it is not rounded."""
        if self.codes is None or self.scale is None:
            return self.values
        return dequantize(self.codes, self.scale)


class Weight(Protocol):
    """A weight in one of its forms."""

    nbytes: int
    """Memory that it takes besides the packed weight."""

    def product(self, operand: Operand) -> Tensor:
        """x Wᵀ, float32 [tokens, out]."""
        ...


def arithmetic_of(spec: LinearSpec, execution: Execution) -> Arithmetic:
    """How linears run when `execution` is asked for: only those that can run on integers have the choice."""
    return execution if spec.execution == "integer" else spec.execution


def prepare_weight(linear: PackedLinear, site: PackedSite, arithmetic: Arithmetic) -> Weight:
    """The form that a linear's arithmetic multiplies."""
    if site.spec.weight.mixed:
        return _Rows(linear, site, arithmetic)
    bits = site.spec.weight.bits
    return _of_codes(unpack(linear.packed, bits), linear.scale, site, arithmetic, bits)


class PackedWeight:
    """Only the packed weight: what is multiplied is prepared for each product and dropped after it."""

    nbytes = 0

    def __init__(self, linear: PackedLinear, site: PackedSite, arithmetic: Arithmetic) -> None:
        self._prepare = partial(prepare_weight, linear, site, arithmetic)

    def product(self, operand: Operand) -> Tensor:
        return self._prepare().product(operand)


def unpacked_bytes(sites: Iterable[PackedSite], execution: Execution) -> int:
    """Memory that the prepared weights of `sites` take besides the packed ones; nothing is unpacked to find out."""
    return sum(_bytes(linear, site, arithmetic_of(site.spec, execution)) for site in sites for linear in site.linears)


def _bytes(linear: PackedLinear, site: PackedSite, arithmetic: Arithmetic) -> int:
    (outputs, scales), spec = linear.scale.shape, site.spec.weight
    if not spec.mixed:
        return outputs * _row_bytes(site, scales, arithmetic, spec.bits)
    counts = {width: len(rows_of(linear.tensors["widths"], width)) for width in CHANNEL_WIDTHS if width}
    per_row = {width: torch.int64.itemsize + _row_bytes(site, scales, arithmetic, width) for width in counts}
    return sum(count * per_row[width] for width, count in counts.items())


def _row_bytes(site: PackedSite, scales: int, arithmetic: Arithmetic, bits: int) -> int:
    """Of one row of a weight with `scales` scales in a row, as `_of_codes` and `_Rows` prepare it."""
    if bits == 16 or site.spec.execution != "integer":
        return site.in_features * torch.float32.itemsize
    return prepared_bytes((1, site.in_features), scales, _groups(site, scales), _kernel(arithmetic), bits)


def _of_codes(codes: Tensor, scale: Tensor, site: PackedSite, arithmetic: Arithmetic, bits: int) -> Weight:
    if site.spec.execution != "integer":
        return _Dense(dequantize(codes, scale.float()))
    return _Codes(GroupedWeight(codes, scale, _groups(site, scale.shape[1]), _kernel(arithmetic), bits))


def _groups(site: PackedSite, scales: int) -> int:
    """At how many places of a row the accumulators are flushed."""
    return max(site.in_features // (site.spec.activation.group_size or site.in_features), scales)


def _kernel(arithmetic: Arithmetic) -> Execution:
    return "integer" if arithmetic == "integer" else "simulated"


class _Codes:
    """Codes multiplied with codes."""

    def __init__(self, weight: GroupedWeight) -> None:
        self._weight, self.nbytes = weight, weight.nbytes

    def product(self, operand: Operand) -> Tensor:
        assert operand.codes is not None and operand.scale is not None
        return self._weight.matmul(operand.codes, operand.scale)


class _Dense:
    """Dequantized values."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self.nbytes = weight, weight.nbytes

    def product(self, operand: Operand) -> Tensor:
        return operand.rounded @ self._weight.t()


class _Rows:
    """Rows of several widths: each width in its own form, rows of 16 bits in floating point."""

    def __init__(self, linear: PackedLinear, site: PackedSite, arithmetic: Arithmetic) -> None:
        widths = linear.tensors["widths"]
        self._out = len(widths)
        self._parts: list[tuple[Tensor, Weight]] = []
        for width, rows in unpack_rows(linear.packed, widths, site.in_features).items():
            which = rows_of(widths, width)
            scale = linear.scale[which]
            form = _Dense(dequantize(rows.float(), scale.float())) if width == 16 else None
            self._parts.append((which, form or _of_codes(rows, scale, site, arithmetic, width)))
        self.nbytes = sum(rows.nbytes + weight.nbytes for rows, weight in self._parts)

    def product(self, operand: Operand) -> Tensor:
        y = torch.zeros(len(operand.values), self._out)
        for rows, weight in self._parts:
            y[:, rows] = weight.product(operand)
        return y
