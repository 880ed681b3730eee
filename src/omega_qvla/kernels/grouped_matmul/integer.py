"""Products of int8 with int32 accumulators, on the CPU through torch's own libraries.

oneDNN's quantized linear with all scales set to one returns the accumulators themselves. Inputs are handed over
unsigned, with a zero point: signed ones take it 10,000 times as long on processors with VNNI (torch 2.11). On those
without, it adds pairs of products in 16 bits, which is exact for weights of up to seven bits; wider ones go to
`torch._int_mm`, which is slow without VNNI, and exact everywhere but for a single channel: with VNNI, torch 2.11 then
returns memory as it found it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_PAIR_SAFE_BITS = 7
_ZERO_POINT = 128


def prepare(codes: Tensor, bits: int) -> Callable[[Tensor], Tensor]:
    """The inner sums against codes int8 [N, k] of at most `bits` bits, as whole numbers in float32 (exact below
    2^24).

    Raises `ValueError` on a device other than the CPU.
    """
    if codes.device.type != "cpu":
        raise ValueError(f"integer execution runs on the CPU, not on {codes.device}; use execution 'simulated'")
    if torch.backends.mkldnn.is_available() and bits <= _PAIR_SAFE_BITS:
        return _onednn(codes)
    transposed = codes.t()
    if len(transposed) == 1:
        return lambda x: x.to(torch.int32) * transposed
    return lambda x: torch._int_mm(x.contiguous(), transposed)


def _onednn(codes: Tensor) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)

    def accumulate(x: Tensor) -> Tensor:
        unsigned = x.contiguous().view(torch.uint8) ^ _ZERO_POINT
        return torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, _ZERO_POINT, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return accumulate
