"""The input of a site: X' = (X · before)[:, order] · diag(rotation) · after, and its codes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from omega_qvla.kernels.native.library import address, checked, chosen, compiled, threads_to_round


class RoundedInput:
    """The codes of some tokens, their sums and scales, in one piece of memory.

    A small policy rounds hundreds of inputs for a chunk of actions, and each tensor costs microseconds.
    """

    __slots__ = ("_memory", "fixed_scale", "flushed", "groups", "scales", "shape", "tokens", "values", "width")

    def __init__(
        self, source: NativeInput, shape: torch.Size, fixed_scale: Tensor | None, values: Tensor | None
    ) -> None:
        """Room for what `source` makes of tokens in that shape, with values X' float32 [tokens, in] if there is a
        tensor for them."""
        self.shape, self.tokens = shape, (tokens := shape.numel())
        self.groups, self.width, self.flushed = source.groups, source.width, source.flushed
        self.scales = source.scales if fixed_scale is None else 0
        self.fixed_scale, self.values = fixed_scale, values
        codes = self.groups * tokens * self.width
        self._memory = torch.empty(codes + 4 * tokens * (self.groups + self.scales), dtype=torch.int8)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of codes, sums and scales."""
        codes = self._memory.data_ptr()
        sums = codes + self.groups * self.tokens * self.width
        if self.fixed_scale is not None:
            return codes, sums, self.fixed_scale.data_ptr()
        return codes, sums, sums + 4 * self.groups * self.tokens

    @property
    def codes(self) -> Tensor:
        """int8 [groups, tokens, width], each group padded with zeros"""
        size = self.groups * self.tokens * self.width
        return self._memory[:size].view(self.groups, self.tokens, self.width)

    @property
    def sums(self) -> Tensor:
        """Of the codes of each group, int32 [groups, tokens]"""
        start = self.groups * self.tokens * self.width
        end = start + 4 * self.groups * self.tokens
        return self._memory[start:end].view(torch.int32).view(self.groups, self.tokens)

    @property
    def scale(self) -> Tensor:
        """float32 [tokens, scales], or [1, 1] if it is fixed"""
        if self.fixed_scale is not None:
            return self.fixed_scale
        start = self.groups * self.tokens * (self.width + 4)
        return self._memory[start:].view(torch.float32).view(self.tokens, self.scales)

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
        self.name, self._last = name, (channels,)
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
        """The codes of x [..., channels], float32 or bfloat16. `fixed_scale`: float32 [1, 1]; None: the scale that
        just reaches the peak of each token's group.

        Raises `ValueError` if X' is not finite, or for other shapes and dtypes.
        """
        x = self._input_of(x)
        if fixed_scale is not None:
            fixed_scale = checked("the fixed scale", fixed_scale, torch.float32, 1, 1)
        shape = x.shape[:-1]
        kept = torch.empty(shape.numel(), self.channels) if values else None
        rounded = RoundedInput(self, shape, fixed_scale, kept)
        codes, sums, scale = rounded.addresses
        fixed, dynamic = (0, scale) if fixed_scale is None else (scale, 0)
        self._run(x, rounded.tokens, fixed, codes, sums, dynamic, address(rounded.values))
        return rounded

    def transform(self, x: Tensor) -> Tensor:
        """X' float32 [tokens, channels] of x [..., channels], float32 or bfloat16. Raises as `round` does."""
        x = self._input_of(x)
        values = torch.empty(x.numel() // self.channels, self.channels)
        self._run(x, len(values), 0, 0, 0, 0, values.data_ptr())
        return values

    def _input_of(self, x: Tensor) -> Tensor:
        short = x.dtype == torch.bfloat16
        if (short or x.dtype == torch.float32) and x.shape[-1:] == self._last and x.is_cpu:
            return x.contiguous()
        return checked("the input", x, torch.bfloat16 if short else torch.float32, *x.shape[:-1], self.channels)

    def _run(self, x: Tensor, tokens: int, fixed: int, codes: int, sums: int, scale: int, values: int) -> None:
        """With the addresses of what is read and written; 0: not that."""
        short = x.dtype == torch.bfloat16
        threads = threads_to_round(tokens * self.channels)
        if not self._input.quantize(x.data_ptr(), short, tokens, fixed, codes, sums, scale, values, threads):
            raise ValueError(f"the input of {self.name} contains NaN or infinity")
