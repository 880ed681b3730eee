"""A packed weight made ready for one execution, and what it is multiplied with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from omega_qvla.kernels.grouped_matmul import GroupedWeight
from omega_qvla.numerics.quantizer import dequantize
from omega_qvla.pack.bits import unpack
from omega_qvla.pack.rows import rows_of, unpack_rows
from omega_qvla.pack.site import PackedLinear, PackedSite


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


def prepare_weight(
    linear: PackedLinear, site: PackedSite, execution: Literal["integer", "dequantized", "simulated"]
) -> Weight:
    """The form that a linear's execution multiplies."""
    if site.spec.weight.mixed:
        return _Rows(linear, site, execution)
    return _of_codes(unpack(linear.packed, site.spec.weight.bits), linear.scale, site, execution)


def _of_codes(codes: Tensor, scale: Tensor, site: PackedSite, execution: str) -> Weight:
    if site.spec.execution != "integer":
        return _Dense(dequantize(codes, scale.float()))
    group_size = site.spec.activation.group_size or site.in_features
    groups = max(site.in_features // group_size, scale.shape[1])
    return _Codes(GroupedWeight(codes, scale, groups, "integer" if execution == "integer" else "simulated"))


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

    def __init__(self, linear: PackedLinear, site: PackedSite, execution: str) -> None:
        widths = linear.tensors["widths"]
        self._out = len(widths)
        self._parts: list[tuple[Tensor, Weight]] = []
        for width, rows in unpack_rows(linear.packed, widths, site.in_features).items():
            which = rows_of(widths, width)
            scale = linear.scale[which]
            form = _Dense(dequantize(rows.float(), scale.float())) if width == 16 else None
            self._parts.append((which, form or _of_codes(rows, scale, site, execution)))
        self.nbytes = sum(weight.nbytes for _, weight in self._parts)

    def product(self, operand: Operand) -> Tensor:
        y = torch.zeros(len(operand.values), self._out)
        for rows, weight in self._parts:
            y[:, rows] = weight.product(operand)
        return y
