"""The input of a site: X' = (X · before)[:, order] · diag(rotation) · after, and its codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omega_qvla.kernels.native.library import address, checked, chosen, compiled


@dataclass
class RoundedInput:
    """The codes of some tokens."""

    codes: Tensor
    """int8 [groups, tokens, width], each group padded with zeros"""
    sums: Tensor
    """Of the codes of each group, int32 [groups, tokens]"""
    scale: Tensor
    """float32 [tokens, scales], or [1, 1] if it is fixed"""
    values: Tensor | None
    """X' float32 [tokens, in], if it was asked for"""
    flushed: int
    """Channels in a group, without padding"""

    @property
    def flat(self) -> Tensor:
        """The codes without padding, int8 [tokens, in]"""
        return self.codes[..., : self.flushed].transpose(0, 1).flatten(1)


class NativeInput:
    """How the inputs of one site are transformed and rounded."""

    def __init__(
        self,
        name: str,
        channels: int,
        *,
        before: Tensor | None = None,
        order: Tensor | None = None,
        rotation: Tensor | Literal["hadamard"] | None = None,
        after: Tensor | None = None,
        block_size: int = 1,
        group_size: int | None = None,
        flushed: int | None = None,
        lowest: int = -7,
        highest: int = 7,
        kernels: str | None = None,
    ) -> None:
        """`name`: of the site, for messages. `before`, `after`: float32 [channels]. `order`: int32 [channels].
        `rotation`: matrices of blocks of channels, float32 or bfloat16 [channels / block_size, block_size,
        block_size], or the normalized Hadamard matrix. `group_size`: channels that share a scale; None: all.
        `flushed`: channels after which accumulators are flushed, which divides `group_size`. Codes go from `lowest`
        to `highest`.

        Raises `ValueError` for tensors of other shapes or dtypes and for sizes that do not divide each other.
        """
        group = group_size or channels
        flush = flushed or group
        if channels < 1 or channels % group or group % flush:
            raise ValueError(f"{channels} channels do not come in groups of {group}, flushed after {flush}")
        if not -128 <= lowest <= 0 < highest <= 127:
            raise ValueError(f"codes from {lowest} to {highest} are no signed bytes around zero")
        if rotation is not None and channels % block_size:
            raise ValueError(f"blocks of {block_size} channels do not divide an input of {channels}")
        hadamard = isinstance(rotation, str)
        if hadamard and block_size & (block_size - 1):
            raise ValueError(f"a Hadamard matrix has a power of two of rows, not {block_size}")
        matrices = None
        if isinstance(rotation, Tensor):
            dtype = torch.bfloat16 if rotation.dtype == torch.bfloat16 else torch.float32
            matrices = checked("rotation", rotation, dtype, channels // block_size, block_size, block_size)
        if order is not None:
            order = checked("order", order, torch.int32, channels)
            if not torch.equal(order.sort().values, torch.arange(channels, dtype=torch.int32)):
                raise ValueError(f"order is no permutation of {channels} channels")
        factors = [
            None if factor is None else checked(name, factor, torch.float32, channels)
            for name, factor in (("before", before), ("after", after))
        ]
        if factors[0] is not None and order is not None:
            factors[0] = factors[0][order.long()]  # as the kernels meet them
        self.name = name
        self.channels, self.flushed, self.groups, self.scales = channels, flush, channels // flush, channels // group
        step = compiled().STEP
        self.width = -(-flush // step) * step
        self._held = (matrices, order, *factors)  # the addresses stay valid as long as these live
        short = matrices is not None and matrices.dtype == torch.bfloat16
        self._input = compiled().Input(
            chosen(kernels),
            channels=channels,
            before=address(factors[0]),
            order=address(order),
            after=address(factors[1]),
            block=block_size if rotation is not None else 1,
            hadamard=hadamard,
            matrices=0 if short else address(matrices),
            short_matrices=address(matrices) if short else 0,
            group=group,
            flushed=flush,
            lowest=lowest,
            highest=highest,
        )

    def round(self, x: Tensor, fixed_scale: Tensor | None = None, *, values: bool = False) -> RoundedInput:
        """The codes of x [tokens, channels], float32 or bfloat16. `fixed_scale`: float32 [1, 1]; None: the scale that
        just reaches the peak of each token's group.

        Raises `ValueError` if X' is not finite, or for other shapes and dtypes.
        """
        x = self._tokens(x)
        tokens = len(x)
        codes = torch.empty(self.groups, tokens, self.width, dtype=torch.int8)
        sums = torch.empty(self.groups, tokens, dtype=torch.int32)
        if fixed_scale is None:
            scale = torch.empty(tokens, self.scales)
        else:
            scale = checked("the fixed scale", fixed_scale, torch.float32, 1, 1)
        kept = torch.empty(tokens, self.channels) if values else None
        self._run(x, codes, sums, scale, kept, fixed=fixed_scale is not None)
        return RoundedInput(codes, sums, scale, kept, self.flushed)

    def transform(self, x: Tensor) -> Tensor:
        """X' float32 [tokens, channels] of x [tokens, channels], float32 or bfloat16. Raises as `round` does."""
        x = self._tokens(x)
        values = torch.empty(len(x), self.channels)
        self._run(x, None, None, None, values, fixed=False)
        return values

    def _tokens(self, x: Tensor) -> Tensor:
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        if x.dtype == dtype and x.dim() == 2 and x.shape[1] == self.channels and x.is_cpu and x.is_contiguous():
            return x
        return checked("the input", x, dtype, x.shape[0] if x.dim() else 0, self.channels)

    def _run(
        self,
        x: Tensor,
        codes: Tensor | None,
        sums: Tensor | None,
        scale: Tensor | None,
        values: Tensor | None,
        *,
        fixed: bool,
    ) -> None:
        finite = self._input.quantize(
            address(x),
            x.dtype == torch.bfloat16,
            len(x),
            address(scale) if fixed else 0,
            address(codes),
            address(sums),
            0 if fixed else address(scale),
            address(values),
            torch.get_num_threads(),
        )
        if not finite:
            raise ValueError(f"the input of {self.name} contains NaN or infinity")
