"""The symmetric uniform quantizer and its scales (Ω-QVLA Eq. 8-9).

A scale belongs to a group of neighbouring input channels of one row: W [rows, in] has scales
[rows, in / group_size]. One group as wide as the row gives one scale per output channel or token.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from omega_qvla.kernels import native
from omega_qvla.spec import Codes

ScaleSearch = Literal["max", "mse", "mse_coarse", "output"]

SCALE_DTYPE = torch.bfloat16
"""Weight scales are stored in two bytes with the exponent range of float32: a float16 scale can underflow."""

_RANK_ROUNDING = 1e-6
"""How far a rank can be above a whole number only because 99.9 has no exact binary form."""

_CACHED = 2**18
"""Weights whose scales are searched at a time: few enough to stay in the caches, enough for torch to share out."""
_ROWS_MULTIPLE = 64
"""Of the rows that are searched at a time, so that sums over columns, too, are made as in the whole matrix."""

_FRACTIONS: dict[str, list[float]] = {
    "mse": torch.linspace(1.0, 0.5, 51).tolist(),
    "mse_coarse": [1 / alpha for alpha in (0.5, 0.75, 1.0, 1.25, 1.5)],
    "output": [1 - i / 20 for i in range(10)],
}
"""By search, the fractions of the peak's scale that are tried."""


def qmax(bits: int) -> int:
    """Largest code, which the peak gets: 7 at four bits."""
    return 2 ** (bits - 1) - 1


def qmin(bits: int, codes: Codes = "symmetric") -> int:
    """Smallest code: at four bits -7 if codes are `symmetric`, as in the papers, and -8 if they are `full`."""
    return -qmax(bits) - (codes == "full")


def quantize(x: Tensor, scale: Tensor, bits: int, codes: Codes = "symmetric") -> Tensor:
    """Codes int8 [rows, in] of x [rows, in] with scales [rows or 1, groups], from `qmin` to `qmax`.

    A scale of zero belongs to a group of zeros and gives codes of zero.
    """
    return _codes(_groups(x, scale.shape[-1]), scale, bits, codes).to(torch.int8).reshape(x.shape)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """x̂ [rows, in] in the scale's dtype from codes [rows, in] and scales [rows or 1, groups]."""
    return (_groups(codes.to(scale.dtype), scale.shape[-1]) * scale[..., None]).reshape(codes.shape)


def peak_scale(x: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """The scale that just reaches the largest magnitude: peak / qmax (Eq. 9), [rows, groups]."""
    return _groups(x, _group_count(x, group_size)).abs().amax(-1) / qmax(bits)


def percentile(x: Tensor, percent: float) -> Tensor:
    """The nearest-rank percentile of |x| [tokens, in] over the tokens, [in]."""
    rank = max(1, math.ceil(percent * len(x) / 100 - _RANK_ROUNDING))
    return x.abs().kthvalue(rank, dim=0).values


def weight_scale(
    weight: Tensor,
    bits: int,
    group_size: int | None = None,
    search: ScaleSearch = "max",
    hessian: Tensor | None = None,
    codes: Codes = "symmetric",
) -> Tensor:
    """Scales [out, groups] of a weight [out, in], in its dtype but with values that SCALE_DTYPE can store.

    `max` takes the peak's scale. The searches take that fraction of it whose `codes` leave the smallest error:

    - `mse`: squared error of the weight, fractions 1.00, 0.99 ... 0.50;
    - `mse_coarse`: the same with fractions 1/α, α in {0.5, 0.75, 1, 1.25, 1.5} (code released with Ω-QVLA);
    - `output`: squared error of the group's share in the output, Δw_g H_gg Δw_gᵀ with H_gg the group's diagonal
      block of `hessian` XᵀX [in, in], fractions 1.00, 0.95 ... 0.55 (clip search of AWQ's code: 20 steps, at most
      half of them). Its products are computed in the weight's dtype.

    Raises `ValueError` for any other search, for groups that do not divide the input, and with `output` if there
    is no Hessian or it is not finite.
    """
    peak = peak_scale(weight, bits, group_size)
    if search == "max":
        return storable(peak)
    if search not in _FRACTIONS:
        raise ValueError(f"there is no scale search {search!r}; there are max, {', '.join(_FRACTIONS)}")
    grouped, fractions = _groups(weight, peak.shape[-1]), _FRACTIONS[search]
    if search == "output":
        blocks = _diagonal_blocks(hessian, peak.shape[-1]).to(weight.dtype)
        return _best_scale(grouped, peak, fractions, bits, codes, blocks)
    if native.available():
        numbers = grouped.flatten(0, 1), peak.flatten()
        return native.search_scale(*numbers, fractions, qmin(bits, codes), qmax(bits)).view_as(peak)
    rows = max(1, _CACHED // (_ROWS_MULTIPLE * weight.shape[-1])) * _ROWS_MULTIPLE
    pieces = zip(grouped.split(rows), peak.split(rows), strict=True)
    return torch.cat([_best_scale(piece, its_peak, fractions, bits, codes) for piece, its_peak in pieces])


def output_error(residual: Tensor, hessian: Tensor) -> Tensor:
    """Squared error of each output over the calibration tokens, δ H δᵀ [..., out].

    `residual` [..., out, in]: what the weights miss; `hessian` [..., in, in]: XᵀX, of the same dtype.
    """
    return ((residual @ hessian) * residual).sum(-1)


def check_finite(hessian: Tensor) -> None:
    """Raises `ValueError` if a Hessian contains NaN or infinity."""
    if hessian.numel() and not torch.stack(hessian.aminmax()).isfinite().all():  # one pass, and NaN shows in both
        raise ValueError("the Hessian is not finite: calibration inputs contain NaN or infinity")


def storable(scale: Tensor) -> Tensor:
    """The nearest values that SCALE_DTYPE can store, in the dtype given."""
    return scale.to(SCALE_DTYPE).to(scale.dtype)


def _best_scale(
    grouped: Tensor, peak: Tensor, fractions: list[float], bits: int, codes: Codes, blocks: Tensor | None = None
) -> Tensor:
    """The storable fraction of `peak` [rows, groups] whose codes leave the smallest error, by `_group_error`."""
    best, best_error = storable(peak), torch.full_like(peak, torch.inf)
    for fraction in fractions:
        scale = storable(peak * fraction)
        residual = _codes(grouped, scale, bits, codes).mul_(scale[..., None]).sub_(grouped)
        error = _group_error(residual, blocks)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best


def _codes(grouped: Tensor, scale: Tensor, bits: int, codes: Codes) -> Tensor:
    """Codes of a tensor [rows, groups, in / groups], in its dtype."""
    inverse = torch.where(scale > 0, 1 / scale, 0)[..., None]
    return (grouped * inverse).round_().clamp_(qmin(bits, codes), qmax(bits))


def _groups(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, x.shape[-1] // count))


def _group_count(x: Tensor, group_size: int | None) -> int:
    width = x.shape[-1]
    if group_size is None:
        return 1
    if width % group_size:
        raise ValueError(f"groups of {group_size} channels do not divide an input of {width}")
    return width // group_size


def _diagonal_blocks(hessian: Tensor | None, count: int) -> Tensor:
    """H_gg of every group, [groups, in / groups, in / groups]."""
    if hessian is None:
        raise ValueError("scale search 'output' weighs errors with the Hessian of the input: pass `hessian`")
    check_finite(hessian)
    size = len(hessian) // count
    blocks = hessian.reshape(count, size, count, size)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _group_error(residual: Tensor, blocks: Tensor | None) -> Tensor:
    """[out, groups] of a residual [out, groups, in / groups]: its square, or with H_gg what it does to the output."""
    if blocks is None:
        return residual.square().sum(-1)
    return output_error(residual.transpose(0, 1), blocks).t()
