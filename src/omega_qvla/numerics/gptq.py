"""Second-order rounding (GPTQ, Frantar et al. 2022, Algorithm 1).

Columns are rounded one after another; what rounding a column does to the output is made good by the columns
that are still to come, with the Cholesky factor of the inverse Hessian.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from omega_qvla.numerics.quantizer import qmax, weight_scale

_BLOCK = 128


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper U, float64 [in, in], with UᵀU = (H + damping · mean(diag H) · I)⁻¹.

    Reverse, factorize, reverse, solve: the inverse itself is never formed. A channel that never carried
    anything has a zero on the diagonal; it is given the mean, so that it is rounded for itself.

    Raises `ValueError` if the Hessian is not finite or is zero throughout.
    """
    hessian = hessian.double().clone()
    if not hessian.isfinite().all():
        raise ValueError("the Hessian is not finite: calibration inputs contain NaN or infinity")
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if mean <= 0:
        raise ValueError("the Hessian is zero: the layer saw no calibration input")
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    lower = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1).contiguous()  # H = L̃ L̃ᵀ with L̃ upper
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.linalg.solve_triangular(lower, identity, upper=True)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    search: Literal["max", "mse"] = "max",
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales [out, groups] of W [out, in], given H = XᵀX [in, in].

    A group's scales are fitted when its first column is reached, to the weights as corrected by then. With
    H = I this is round-to-nearest.
    """
    factor = inverse_factor(hessian, damping)
    out, width = weight.shape
    group = width if group_size is None else group_size
    if width % group:
        raise ValueError(f"groups of {group} channels do not divide an input of {width}")
    limit = qmax(bits)
    columns = weight.double().t().contiguous()  # one column of W is one contiguous row here
    codes = torch.empty(width, out, dtype=torch.int8)
    scales: list[Tensor] = []
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        errors = torch.zeros(end - start, out, dtype=torch.float64)
        for j in range(start, end):
            if j % group == 0:
                current = _corrected(columns, factor, errors, start, end, j, j + group)
                scale = weight_scale(current.t(), bits, None, search).squeeze(1)
                inverse = torch.where(scale > 0, 1 / scale, 0)
                scales.append(scale)
            code = (columns[j] * inverse).round_().clamp_(-limit, limit)
            codes[j] = code.to(torch.int8)
            error = (columns[j] - code * scale) / factor[j, j]
            errors[j - start] = error
            columns[j + 1 : end] -= factor[j, j + 1 : end, None] * error
        columns[end:] -= factor[start:end, end:].t() @ errors
    return codes.t().contiguous(), torch.stack(scales, 1)


def _corrected(
    columns: Tensor, factor: Tensor, errors: Tensor, start: int, end: int, first: int, last: int
) -> Tensor:
    """Columns first..last as all errors so far leave them; those beyond the block await this block's errors."""
    if last <= end:
        return columns[first:last]
    beyond = columns[end:last] - factor[start:end, end:last].t() @ errors
    return torch.cat([columns[first:end], beyond])
