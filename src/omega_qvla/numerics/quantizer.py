"""The symmetric uniform quantizer and its scales (Ω-QVLA Eq. 8-9).

A scale belongs to a group of neighbouring input channels of one row: W [rows, in] has scales
[rows, in / group_size]. One group as wide as the row gives one scale per output channel or token.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16
"""Weight scales are stored in two bytes with the exponent range of float32: a float16 scale can underflow."""

_SHRINKAGES = torch.linspace(1.0, 0.5, 51)


def qmax(bits: int) -> int:
    """Largest code: 7 at four bits. Codes are symmetric, so that -8 is never used."""
    return 2 ** (bits - 1) - 1


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes int8 [rows, in] of x [rows, in] with scales [rows or 1, groups].

    A scale of zero belongs to a group of zeros and gives codes of zero.
    """
    grouped = _groups(x, scale.shape[-1])
    inverse = torch.where(scale > 0, 1 / scale, 0)[..., None]
    limit = qmax(bits)
    return (grouped * inverse).round_().clamp_(-limit, limit).to(torch.int8).reshape(x.shape)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """x̂ [rows, in] in the scale's dtype from codes [rows, in] and scales [rows or 1, groups]."""
    return (_groups(codes.to(scale.dtype), scale.shape[-1]) * scale[..., None]).reshape(codes.shape)


def peak_scale(x: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """The scale that just reaches the largest magnitude: peak / qmax (Eq. 9), [rows, groups]."""
    return _groups(x, _group_count(x, group_size)).abs().amax(-1) / qmax(bits)


def percentile(x: Tensor, percent: float) -> Tensor:
    """The nearest-rank percentile of |x| [tokens, in] over the tokens, [in]."""
    rank = max(1, math.ceil(percent / 100 * len(x)))
    return x.abs().kthvalue(rank, dim=0).values


def weight_scale(
    weight: Tensor, bits: int, group_size: int | None = None, search: Literal["max", "mse"] = "max"
) -> Tensor:
    """Scales [out, groups] of a weight [out, in], in its dtype but with values that SCALE_DTYPE can store.

    `mse` tries fractions 1.00, 0.99 ... 0.50 of the peak and takes the smallest squared error.
    """
    peak = peak_scale(weight, bits, group_size)
    if search == "max":
        return storable(peak)
    best, best_error = storable(peak), torch.full_like(peak, torch.inf)
    for shrinkage in _SHRINKAGES.tolist():
        scale = storable(peak * shrinkage)
        residual = dequantize(quantize(weight, scale, bits), scale) - weight
        error = _groups(residual, peak.shape[-1]).square().sum(-1)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best


def storable(scale: Tensor) -> Tensor:
    """The nearest values that SCALE_DTYPE can store, in the dtype given."""
    return scale.to(SCALE_DTYPE).to(scale.dtype)


def _groups(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, x.shape[-1] // count))


def _group_count(x: Tensor, group_size: int | None) -> int:
    width = x.shape[-1]
    if group_size is None:
        return 1
    if width % group_size:
        raise ValueError(f"groups of {group_size} channels do not divide an input of {width}")
    return width // group_size
