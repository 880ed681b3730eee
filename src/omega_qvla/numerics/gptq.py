"""Second-order rounding (GPTQ, Frantar et al. 2022, Algorithm 1).

Columns are rounded one after another; what rounding a column does to the output is made good by the columns that
are still to come. With H = R Rᵀ and R upper triangular, the error E of the weights costs ‖E R‖², and column j of
E R involves columns 0 ... j alone: a column is rounded so that its own term is smallest, given the errors before
it. That is Algorithm 1 without the inverse Hessian, whose Cholesky factor is R⁻¹.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from omega_qvla.kernels import native
from omega_qvla.numerics.quantizer import ScaleSearch, check_finite, qmax, qmin, weight_scale
from omega_qvla.spec import Codes

_BLOCK = 512
"""Columns whose errors are passed on together, beyond them."""
_SPAN = 128
"""Columns that are rounded together, one after another."""
_RELEASED_BLOCK = 128
_FLOAT64_UP_TO = 1024


def solver_dtype(width: int) -> torch.dtype:
    """What a layer with so many inputs is solved in: float64, or float32 above 1024, where time and memory count."""
    return torch.float64 if width <= _FLOAT64_UP_TO else torch.float32


def hessian_factor(hessian: Tensor, damping: float, *, overwrite: bool = False) -> Tensor:
    """Upper R [in, in] with R Rᵀ = H + damping · mean(diag H) · I, in the dtype of H.

    A channel that never carried anything has a zero on the diagonal; it is given the mean, so that it is rounded
    for itself. `overwrite`: use the memory of H.

    Raises `ValueError` if the Hessian is not finite, is zero throughout or is not positive definite.
    """
    check_finite(hessian)
    hessian = hessian if overwrite else hessian.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if mean <= 0:
        raise ValueError("the Hessian is zero: the layer saw no calibration input")
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    for end in range(len(hessian), 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        members = slice(start, end)
        hessian[:end, members] -= hessian[:end, end:] @ hessian[members, end:].t()
        try:
            lower = torch.linalg.cholesky(hessian[members, members].flip(0, 1))
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"the Hessian is not positive definite with damping {damping}: raise `weight.damping`, or calibrate "
                "on more observations"
            ) from error
        upper = lower.flip(0, 1)
        hessian[members, members] = upper
        hessian[:start, members] = torch.linalg.solve_triangular(
            upper.t(), hessian[:start, members], upper=False, left=False
        )
        hessian[end:, members] = 0
    return hessian


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    search: ScaleSearch = "max",
    damping: float = 0.01,
    codes: Codes = "symmetric",
) -> tuple[Tensor, Tensor]:
    """`round_with_factor` given H = XᵀX [in, in], in float64. With H = I this is round-to-nearest.

    Raises `ValueError` as `hessian_factor` and `round_with_factor` do.
    """
    factor = hessian_factor(hessian.double(), damping)
    return round_with_factor(weight, factor, bits=bits, group_size=group_size, search=search, codes=codes)


def round_with_factor(
    weight: Tensor,
    factor: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    search: ScaleSearch = "max",
    codes: Codes = "symmetric",
) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales [out, groups] of W [out, in], given R [in, in] from `hessian_factor`.

    A group's scales are fitted when its first column is reached, to the weights as they would best make good the
    errors so far. Computed in R's dtype.

    Raises `ValueError` if the groups do not divide the input, and for the search `output`, which is for rounding to
    nearest.
    """
    if search == "output":
        raise ValueError("scale search 'output' is for rounding 'rtn': with GPTQ use 'max', 'mse' or 'mse_coarse'")
    out, width = weight.shape
    group = width if group_size is None else group_size
    if width % group:
        raise ValueError(f"groups of {group} channels do not divide an input of {width}")
    columns = _columns(weight, factor.dtype)
    errors = torch.zeros_like(columns)
    rounded = torch.empty(width, out, dtype=torch.int8)
    scales: list[Tensor] = []
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        owed = factor[:start, start:end].t() @ errors[:start]  # column j of E R, so far
        for first, last in _spans(start, end, group):
            if first % group == 0:
                beyond = factor[:first, end : first + group].t() @ errors[:first]
                members = slice(first, first + group)
                best = _best_correction(factor[members, members], torch.cat([owed[first - start :], beyond]))
                corrected = (columns[members] + best).t().contiguous()
                scales.append(weight_scale(corrected, bits, None, search, codes=codes).squeeze(1))
            span = slice(first, last)
            rounded[span], errors[span] = _round_columns(
                columns[span],
                owed[first - start : last - start],
                factor[span, span],
                scales[-1],
                qmin(bits, codes),
                qmax(bits),
            )
            owed[last - start :] += factor[span, last:end].t() @ errors[span]
    return rounded.t().contiguous(), torch.stack(scales, 1)


def gptq_blockwise(
    weight: Tensor, hessian: Tensor, *, bits: int, damping: float = 0.01, codes: Codes = "symmetric"
) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales [out, in / 128] of W [out, in], as the code released with Ω-QVLA has them.

    It differs from `gptq` in three ways: each block of 128 columns is solved alone, with its diagonal block of
    H = XᵀX [in, in] and no error passed on to other blocks; inside it errors are spread with rows of the inverse
    of that block as it is at first, where Algorithm 1 removes each rounded column from the inverse; scales are
    fitted with `mse_coarse` to the block before any correction. Other than in the released code, weights of
    channels that never carried anything are rounded for themselves instead of set to zero.

    Raises `ValueError` if the input is not made of blocks of 128 columns, or as `hessian_factor` does.
    """
    out, width = weight.shape
    if width % _RELEASED_BLOCK:
        raise ValueError(
            f"blocks of {_RELEASED_BLOCK} columns do not divide an input of {width}: use rounding 'gptq' for it"
        )
    scale = weight_scale(weight.double(), bits, _RELEASED_BLOCK, "mse_coarse", codes=codes)
    check_finite(hessian)
    hessian = _with_diagonal(hessian.double())
    rounded = torch.empty(width, out, dtype=torch.int8)
    for block in range(width // _RELEASED_BLOCK):
        members = slice(block * _RELEASED_BLOCK, (block + 1) * _RELEASED_BLOCK)
        factor = hessian_factor(hessian[members, members], damping)
        back = torch.linalg.solve_triangular(factor, torch.eye(_RELEASED_BLOCK, dtype=factor.dtype), upper=True)
        columns = _columns(weight[:, members], torch.float64)
        rounded[members] = _solve_alone(columns, back.t() @ back, scale[:, block], bits, codes)
    return rounded.t().contiguous(), scale


def _solve_alone(columns: Tensor, inverse: Tensor, scale: Tensor, bits: int, codes: Codes) -> Tensor:
    """Codes int8 [block, out] of columns [block, out], which it corrects in place, with scales [out]."""
    rounded = torch.empty_like(columns, dtype=torch.int8)
    reciprocal = torch.where(scale > 0, 1 / scale, 0)
    for j, column in enumerate(columns):
        code = (column * reciprocal).round_().clamp_(qmin(bits, codes), qmax(bits))
        rounded[j] = code.to(torch.int8)
        error = (column - code * scale) / inverse[j, j]
        columns[j + 1 :] -= inverse[j, j + 1 :, None] * error
    return rounded


def _with_diagonal(hessian: Tensor) -> Tensor:
    """A copy whose diagonal has no zero, so that a block which never carried anything can be inverted."""
    diagonal = hessian.diagonal()
    if diagonal.mean() <= 0:
        raise ValueError("the Hessian is zero: the layer saw no calibration input")
    return hessian + torch.diag(diagonal.mean() * (diagonal == 0))


def _spans(start: int, end: int, group: int) -> list[tuple[int, int]]:
    """The columns from `start` to `end`, cut where a group begins and into at most _SPAN."""
    cuts = {*range(start, end, _SPAN), *range(-(-start // group) * group, end, group), end}
    return list(pairwise(sorted(cuts)))


def _round_columns(
    weight: Tensor, owed: Tensor, factor: Tensor, scale: Tensor, lowest: int, highest: int
) -> tuple[Tensor, Tensor]:
    """As the kernel of that name, which does it where there is one."""
    if native.available():
        return native.round_columns(weight, owed, factor, scale, lowest, highest)
    codes, errors, owed = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight), owed.clone()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    for j, column in enumerate(weight):
        code = ((column + owed[j] / factor[j, j]) * inverse).round_().clamp_(lowest, highest)
        codes[j] = code.to(torch.int8)
        errors[j] = column - code * scale
        owed[j + 1 :] += factor[j, j + 1 :, None] * errors[j]
    return codes, errors


def _columns(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy [in, out]: one column of W [out, in] is one contiguous row."""
    return weight.t().to(dtype, memory_format=torch.contiguous_format, copy=True)


def _best_correction(factor: Tensor, owed: Tensor) -> Tensor:
    """What the columns of a group [group, out] would best add to themselves, without rounding, to make good what is
    `owed` [group, out]; `factor` is the group's block of R."""
    return torch.linalg.solve_triangular(factor.t(), owed[: len(factor)], upper=False)
