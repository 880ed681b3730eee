"""A packed weight made ready for one execution, and what it is multiplied with."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from omega_qvla.kernels import native
from omega_qvla.kernels.grouped_matmul import GroupedWeight, prepared_bytes
from omega_qvla.kernels.native import NativeWeight, RoundedInput
from omega_qvla.numerics.quantizer import dequantize
from omega_qvla.pack.bits import unpack
from omega_qvla.pack.rows import rows_of, unpack_rows
from omega_qvla.pack.site import PackedLinear, PackedSite
from omega_qvla.spec import CHANNEL_WIDTHS, Arithmetic, LinearSpec

Execution = Literal["integer", "simulated"]


def as_float(tensor: Tensor | None) -> Tensor | None:
    """As it is multiplied in floating point."""
    return None if tensor is None else tensor.float().contiguous()


class Operand:
    """The transformed input of a site and, where the recipe rounds it, its codes."""

    def __init__(self, values: Tensor | None, codes: Tensor | None, scale: Tensor | None) -> None:
        """`values`: X' float32 [tokens, in]; may be None where codes are all that is multiplied. `codes`: int8
        [tokens, in]. `scale`: of the codes."""
        self.values = values
        self._codes, self._scale = codes, scale
        self.compiled: RoundedInput | None = None
        """The codes as compiled kernels made them."""
        self.products: dict[int, Tensor] = {}
        """Of linears that are multiplied together, until each has taken its own."""
        self.answers: dict[str, tuple[Tensor, int]] = {}
        """What linears have answered, and the tensor's version then: it tells whether the model has changed it."""

    @classmethod
    def of_compiled(cls, found: RoundedInput) -> Operand:
        """What compiled kernels multiply."""
        operand = cls(found.values, None, None)
        operand.compiled = found
        return operand

    @property
    def tokens(self) -> int:
        first = self.codes if self.values is None else self.values
        assert first is not None
        return len(first)

    @property
    def codes(self) -> Tensor | None:
        """int8 [tokens, in]; None where the input is not rounded."""
        return self._codes if self.compiled is None else self.compiled.flat

    @property
    def scale(self) -> Tensor | None:
        """float32 [tokens or 1, groups or in]; None where the input is not rounded."""
        return self._scale if self.compiled is None else self.compiled.scale

    @cached_property
    def rounded(self) -> Tensor:
        """What the codes stand for, float32 [tokens, in]; X' itself where it is not rounded."""
        codes = self.codes
        if codes is None or self.scale is None:
            assert self.values is not None
            return self.values
        return dequantize(codes, self.scale)


class Weight(Protocol):
    """A weight in one of its forms."""

    nbytes: int
    """Memory that it takes besides the packed weight."""

    def product(self, operand: Operand) -> Tensor:
        """x Wᵀ, float32 [tokens, out], or [..., out] in the shape of the input's tokens."""
        ...


def arithmetic_of(spec: LinearSpec, execution: Execution) -> Arithmetic:
    """How linears run when `execution` is asked for: only those that can run on integers have the choice."""
    return execution if spec.execution == "integer" else spec.execution


def compiled(arithmetic: Arithmetic) -> bool:
    """Whether compiled kernels multiply. They need weights laid out in their own way, half a byte each, or a byte
    above four bits: what is stored need not be kept beside it."""
    return arithmetic == "integer" and bool(native.available())


def prepare_weights(site: PackedSite, arithmetic: Arithmetic, *, keep_unpacked: bool) -> list[Weight]:
    """The forms that the linears of a site multiply, in their order. `keep_unpacked`: whether forms that take more
    memory than what is stored are prepared now and kept, or at each call."""
    if compiled(arithmetic) and not site.spec.weight.mixed:
        return _together(site)
    prepare = _prepare if keep_unpacked or compiled(arithmetic) else _Packed
    return [prepare(linear, site, arithmetic) for linear in site.linears]


def _prepare(linear: PackedLinear, site: PackedSite, arithmetic: Arithmetic) -> Weight:
    if site.spec.weight.mixed:
        return _Rows(linear, site, arithmetic)
    bits = site.spec.weight.bits
    return _of_codes(unpack(linear.packed, bits), linear.scale, site, arithmetic, bits)


class _Packed:
    """Only the packed weight: what is multiplied is prepared for each product and dropped after it."""

    nbytes = 0

    def __init__(self, linear: PackedLinear, site: PackedSite, arithmetic: Arithmetic) -> None:
        self._prepare = partial(_prepare, linear, site, arithmetic)

    def product(self, operand: Operand) -> Tensor:
        return self._prepare().product(operand)


def unpacked_bytes(sites: Iterable[PackedSite], execution: Execution) -> int:
    """Memory that the prepared weights of `sites` take besides the packed ones; nothing is unpacked to find out."""
    return sum(
        _bytes(linear, site, arithmetic_of(site.spec, execution))
        for site in sites
        for linear in site.linears
        if not compiled(arithmetic_of(site.spec, execution))
    )


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
    groups = _groups(site, scale.shape[1])
    if compiled(arithmetic):
        return _Compiled(NativeWeight(codes, scale, groups, bits, input_bits=site.spec.activation.bits))
    return _Codes(GroupedWeight(codes, scale, groups, _kernel(arithmetic), bits))


def flushes(site: PackedSite) -> int:
    """At how many places of a row the accumulators of a site's linears are flushed."""
    return _groups(site, site.linears[0].scale.shape[1])


def _groups(site: PackedSite, scales: int) -> int:
    return max(site.in_features // (site.spec.activation.group_size or site.in_features), scales)


def _together(site: PackedSite) -> list[Weight]:
    """The linears of a site as one product, of which each takes its part."""
    bits = site.spec.weight.bits
    codes = torch.cat([unpack(linear.packed, bits) for linear in site.linears])
    scale = torch.cat([linear.scale for linear in site.linears])
    whole = _of_codes(codes, scale, site, "integer", bits)
    if len(site.linears) == 1:
        return [whole]
    sizes = [len(linear.scale) for linear in site.linears]
    return [_Part(whole, sizes, index) for index in range(len(sizes))]


def _kernel(arithmetic: Arithmetic) -> Execution:
    return "integer" if arithmetic == "integer" else "simulated"


class _Codes:
    """Codes multiplied with codes."""

    def __init__(self, weight: GroupedWeight) -> None:
        self._weight, self.nbytes = weight, weight.nbytes

    def product(self, operand: Operand) -> Tensor:
        codes = operand.codes
        assert codes is not None and operand.scale is not None
        return self._weight.matmul(codes, operand.scale)


class _Compiled:
    """Codes multiplied with codes by compiled kernels."""

    def __init__(self, weight: NativeWeight) -> None:
        self._weight, self.nbytes = weight, weight.nbytes

    def product(self, operand: Operand) -> Tensor:
        found = operand.compiled
        assert found is not None
        return self._weight.product(found)


class _Part:
    """Rows of a weight whose product is made once for all linears that read its input."""

    def __init__(self, whole: Weight, sizes: list[int], index: int) -> None:
        self._whole, self._sizes, self._index = whole, sizes, index
        self.nbytes = whole.nbytes * sizes[index] // sum(sizes)

    def product(self, operand: Operand) -> Tensor:
        if self._index not in operand.products:  # or it was taken before: the model may have changed it since
            parts = torch.split_with_sizes(self._whole.product(operand), self._sizes, -1)
            operand.products.update(enumerate(parts))
        return operand.products.pop(self._index)


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
        y = torch.zeros(operand.tokens, self._out)
        for rows, weight in self._parts:
            y[:, rows] = weight.product(operand).view(operand.tokens, -1)
        return y
