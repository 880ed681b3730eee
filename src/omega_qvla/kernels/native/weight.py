"""Weights of linears that read one input, laid out for the compiled product."""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.kernels.native.input import RoundedInput
from omega_qvla.kernels.native.library import address, checked, chosen, compiled, threads_to_multiply

_NARROW_BITS = 4
"""Codes of up to so many bits take one plane of half a byte; wider ones two."""


class NativeWeight:
    """Codes [out, in] of one linear, or of several one below the other, in `groups` equal groups of columns."""

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        groups: int,
        bits: int,
        *,
        input_bits: int = 8,
        kernels: str | None = None,
    ) -> None:
        """`codes`: int8 [out, in] of at most `bits` bits. `scale`: float [out, groups] or [out, 1], kept in bfloat16.
        `input_bits`: of the codes that will be multiplied with these.

        Raises `ValueError` if a scale is no bfloat16 value, codes have more bits, or shapes do not fit.
        """
        library = compiled()
        out, channels = codes.shape
        if channels % groups or scale.shape not in ((out, 1), (out, groups)):
            raise ValueError(f"{groups} groups do not fit codes {list(codes.shape)} and scales {list(scale.shape)}")
        codes = checked("codes", codes, torch.int8, out, channels)
        limit = 2 ** (bits - 1)
        if codes.numel() and not -limit <= int(codes.min()) <= int(codes.max()) < limit:
            raise ValueError(f"codes go from {int(codes.min())} to {int(codes.max())}, which {bits} bits do not hold")
        stored = scale.to(torch.bfloat16)
        if not torch.equal(stored.to(scale.dtype), scale):
            raise ValueError("scales of weights are stored as bfloat16, and these are no bfloat16 values")
        width, tiles = channels // groups, -(-out // library.TILE)
        self.out, self.groups, self.width = out, groups, -(-width // library.STEP) * library.STEP
        self.columns = tiles * library.TILE
        self._row = groups * self.width * self.columns  # products for a token
        planes = 1 if bits <= _NARROW_BITS else 2
        self._wide = input_bits > _NARROW_BITS
        self._packed = torch.empty(tiles * groups * self.width * planes * library.TILE // 2, dtype=torch.uint8)
        library.pack_weight(address(codes), out, groups, width, planes, address(self._packed))
        self._scale = self._tiled(stored)
        self._weight = library.Weight(
            chosen(kernels),
            tiles=tiles,
            groups=groups,
            width=self.width,
            planes=planes,
            weight=address(self._packed),
            scale=address(self._scale),
            scale_per_group=scale.shape[1] > 1,
        )

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes + self._scale.nbytes

    def matmul(self, codes: Tensor, scale: Tensor, sums: Tensor) -> Tensor:
        """float32 [tokens, out] from codes int8 [groups, tokens, width], each group padded with zeros, their sums
        int32 [groups, tokens], and scales float32 [tokens or 1, groups or 1].

        The result may be a part of a larger tensor. Raises `ValueError` for other shapes and dtypes.
        """
        tokens = codes.shape[1] if codes.dim() > 1 else 0
        codes = checked("codes", codes, torch.int8, self.groups, tokens, self.width)
        sums = checked("sums", sums, torch.int32, self.groups, tokens)
        if scale.shape[0] not in (1, tokens) or scale.shape[-1] not in (1, self.groups):
            raise ValueError(f"scales {list(scale.shape)} do not fit {tokens} tokens in {self.groups} groups")
        scale = checked("scale", scale, torch.float32, *scale.shape)
        addresses = codes.data_ptr(), sums.data_ptr(), scale.data_ptr()
        return self._matmul(addresses, codes.shape[1:2], scale.shape[0] > 1, scale.shape[1])

    def product(self, rounded: RoundedInput) -> Tensor:
        """float32 [..., out] from what a `NativeInput` made of [..., in]: only whether it is of as many groups is
        checked."""
        if rounded.groups != self.groups or rounded.width != self.width:
            raise ValueError(f"codes {list(rounded.codes.shape)} do not fit {self.groups} groups of {self.width}")
        fixed = rounded.fixed_scale is not None
        return self._matmul(rounded.addresses, rounded.shape, not fixed, 1 if fixed else rounded.scales)

    def _matmul(
        self, addresses: tuple[int, int, int], shape: torch.Size, scale_per_token: bool, scales: int
    ) -> Tensor:
        """`addresses`: of codes, sums and scales. `shape`: of the tokens."""
        tokens, result = shape.numel(), torch.empty(*shape, self.columns)
        self._weight.multiply(
            *addresses,
            scales if scale_per_token else 0,
            1 if scales > 1 else 0,
            self._wide,
            tokens,
            result.data_ptr(),
            self.columns,
            threads_to_multiply(tokens * self._row),
        )
        return result if self.out == self.columns else result[..., : self.out]

    def _tiled(self, rows: Tensor) -> Tensor:
        """[out, scales] as [tiles, scales, TILE], zeros after the last."""
        padded = torch.zeros(self.columns, rows.shape[1], dtype=rows.dtype)
        padded[: self.out] = rows
        return padded.view(-1, compiled().TILE, rows.shape[1]).transpose(1, 2).contiguous()
