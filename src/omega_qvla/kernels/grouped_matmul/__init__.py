"""y[m, n] = Σ_g s_x[m, g] · s_w[n, g] · Σ_{k in g} x[m, k] · w[n, k] on integer codes.

The inner sum runs on integers and is exact; the outer one flushes the accumulator of each group of input
channels into float32, in ascending order of groups. That order is part of the definition: whatever computes
the inner sums, the results agree bit for bit.

| execution | inner sums | runs |
|---|---|---|
| `reference` | int64 | anywhere; the oracle |
| `integer` | int8 products, int32 accumulators (oneDNN, or `torch._int_mm`) | CPU, where nothing was compiled |
| `simulated` | products of whole numbers in float32, or float64 where sums exceed 2^24 | anywhere |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from omega_qvla.kernels.grouped_matmul import integer, reference, simulated

Execution = Literal["reference", "integer", "simulated"]

Accumulate = Callable[[Tensor], Tensor]
"""Inner sums of one group: codes int8 [M, k] to whole numbers in float32 (or int64) [M, N]."""

_PREPARE: dict[str, Callable[[Tensor, int], Accumulate]] = {
    "reference": reference.prepare,
    "integer": integer.prepare,
    "simulated": simulated.prepare,
}


class GroupedWeight:
    """Weight codes made ready for one execution: [N, K] codes in `groups` equal groups of columns."""

    def __init__(self, codes: Tensor, scale: Tensor, groups: int, execution: Execution, bits: int) -> None:
        """`codes` int8 [N, K] of at most `bits` bits; `scale` float [N, groups] or [N, 1]; `groups` at which
        accumulators are flushed.

        Raises `ValueError` if the groups do not divide K or the execution is unknown.
        """
        if execution not in _PREPARE:
            raise ValueError(f"unknown execution {execution!r}; there are {', '.join(_PREPARE)}")
        if codes.shape[1] % groups or scale.shape[1] not in (1, groups):
            raise ValueError(f"{groups} groups do not fit codes {list(codes.shape)} and scales {list(scale.shape)}")
        self.width = codes.shape[1] // groups
        self.scale = scale.to(torch.float32).t().contiguous()  # [groups or 1, N]
        self.groups = [_PREPARE[execution](part.contiguous(), bits) for part in codes.split(self.width, dim=1)]
        self.nbytes = prepared_bytes(codes.shape, scale.shape[1], groups, execution, bits)

    def matmul(self, codes: Tensor, scale: Tensor) -> Tensor:
        """float32 [M, N] from codes int8 [M, K] and scales float32 [M or 1, groups or 1]."""
        total: Tensor | None = None
        for index, accumulate in enumerate(self.groups):
            part = accumulate(codes[:, index * self.width : (index + 1) * self.width])
            part = part.to(torch.float32) * scale[:, index % scale.shape[1], None]
            part *= self.scale[index % len(self.scale)]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total


def prepared_bytes(shape: Sequence[int], scales: int, groups: int, execution: Execution, bits: int) -> int:
    """Memory of a `GroupedWeight` of codes [N, K] and scales [N, scales]."""
    outputs, inputs = shape
    sizes = {
        "reference": torch.int64.itemsize,
        "integer": torch.int8.itemsize,
        "simulated": simulated.dtype_of(inputs // groups, bits).itemsize,
    }
    return outputs * (inputs * sizes[execution] + scales * torch.float32.itemsize)
