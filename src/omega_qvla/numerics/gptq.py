"""Second-order rounding (GPTQ, Frantar et al. 2022, Algorithm 1).

Columns are rounded one after another; what rounding a column does to the output is made good by the columns
that are still to come, with the Cholesky factor of the inverse Hessian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.numerics.quantizer import ScaleSearch, check_finite, qmax, qmin, weight_scale
from omega_qvla.spec import Codes

_BLOCK = 128


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper U, float64 [in, in], with UᵀU = (H + damping · mean(diag H) · I)⁻¹.

    Reverse, factorize, reverse, solve: the inverse itself is never formed. A channel that never carried
    anything has a zero on the diagonal; it is given the mean, so that it is rounded for itself.

    Raises `ValueError` if the Hessian is not finite, is zero throughout or is not positive definite.
    """
    hessian = _damped(hessian, damping)
    try:
        lower = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1).contiguous()  # H = L̃ L̃ᵀ with L̃ upper
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"the Hessian is not positive definite with damping {damping}: raise `weight.damping`, or calibrate on "
            "more observations"
        ) from error
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.linalg.solve_triangular(lower, identity, upper=True)


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
    """Codes int8 [out, in] and scales [out, groups] of W [out, in], given H = XᵀX [in, in].

    A group's scales are fitted when its first column is reached, to the weights as corrected by then. With
    H = I this is round-to-nearest.

    Raises `ValueError` if the groups do not divide the input, for the search `output`, which is for rounding to
    nearest, or as `inverse_factor` does.
    """
    if search == "output":
        raise ValueError("scale search 'output' is for rounding 'rtn': with GPTQ use 'max', 'mse' or 'mse_coarse'")
    factor = inverse_factor(hessian, damping)
    out, width = weight.shape
    group = width if group_size is None else group_size
    if width % group:
        raise ValueError(f"groups of {group} channels do not divide an input of {width}")
    lowest, highest = qmin(bits, codes), qmax(bits)
    columns = _columns(weight)
    rounded = torch.empty(width, out, dtype=torch.int8)
    scales: list[Tensor] = []
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        errors = torch.zeros(end - start, out, dtype=torch.float64)
        for j in range(start, end):
            if j % group == 0:
                current = _corrected(columns, factor, errors, start, end, j, j + group)
                scale = weight_scale(current.t(), bits, None, search, codes=codes).squeeze(1)
                inverse = torch.where(scale > 0, 1 / scale, 0)
                scales.append(scale)
            code = (columns[j] * inverse).round_().clamp_(lowest, highest)
            rounded[j] = code.to(torch.int8)
            error = (columns[j] - code * scale) / factor[j, j]
            errors[j - start] = error
            columns[j + 1 : end] -= factor[j, j + 1 : end, None] * error
        columns[end:] -= factor[start:end, end:].t() @ errors
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

    Raises `ValueError` if the input is not made of blocks of 128 columns, or as `inverse_factor` does.
    """
    out, width = weight.shape
    if width % _BLOCK:
        raise ValueError(
            f"blocks of {_BLOCK} columns do not divide an input of {width}: use rounding 'gptq' for this layer"
        )
    scale = weight_scale(weight.double(), bits, _BLOCK, "mse_coarse", codes=codes)
    hessian = _damped(hessian, 0.0)  # so that a block which never carried anything can be inverted
    rounded = torch.empty(width, out, dtype=torch.int8)
    for block in range(width // _BLOCK):
        members = slice(block * _BLOCK, (block + 1) * _BLOCK)
        factor = inverse_factor(hessian[members, members], damping)
        columns = _columns(weight[:, members])
        rounded[members] = _solve_alone(columns, factor.t() @ factor, scale[:, block], bits, codes)
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


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """A copy, float64 [in, in], with no zero on its diagonal and a share of the mean added to all of it."""
    check_finite(hessian)
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if mean <= 0:
        raise ValueError("the Hessian is zero: the layer saw no calibration input")
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    return hessian


def _columns(weight: Tensor) -> Tensor:
    """A copy, float64 [in, out]: one column of W [out, in] is one contiguous row."""
    return weight.t().to(torch.float64, memory_format=torch.contiguous_format, copy=True)


def _corrected(
    columns: Tensor, factor: Tensor, errors: Tensor, start: int, end: int, first: int, last: int
) -> Tensor:
    """Columns first..last as all errors so far leave them; those beyond the block await this block's errors."""
    if last <= end:
        return columns[first:last]
    beyond = columns[end:last] - factor[start:end, end:last].t() @ errors
    return torch.cat([columns[first:end], beyond])
