"""Protecting the weights that matter most to the output (AWQ, Lin et al. 2023, §3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omega_qvla.numerics.quantizer import check_finite, dequantize, output_error, quantize, weight_scale

_SMALLEST = 1e-4


def searched_factor(
    input_mean: Tensor,
    weights: Sequence[Tensor],
    hessian: Tensor,
    *,
    bits: int,
    group_size: int | None,
    candidates: int = 20,
) -> Tensor:
    """s, float32 [in], by which input channel j is divided and weight column j is multiplied before rounding.

    Of s_j = mean|X_j|^α with α = 0, 1/candidates ... (candidates - 1)/candidates (AWQ Eq. 5) it is the one with
    the smallest squared error of all outputs, Σ tr(E H Eᵀ) with E = W - Q(W · s) / s. α = 0 is rounding to
    nearest, than which it is never worse. As in AWQ's code s is clipped from below to 1e-4 and then divided by
    √(max s · min s). A channel that was always zero takes no part and keeps the factor 1.

    `input_mean` [in]: mean |X_j| over the calibration tokens. `weights`: all linears that read the input, each
    [out_i, in], of one dtype, in which errors are computed. `hessian` [in, in]: XᵀX.

    Raises `ValueError` if the Hessian is not finite, if every channel was zero, or if the groups do not divide
    the input.
    """
    check_finite(hessian)
    dead = input_mean == 0
    if dead.all():
        raise ValueError("all input channels are zero: the layer saw no calibration input")
    best, best_error = torch.ones_like(input_mean, dtype=torch.float32), torch.inf
    hessian = hessian.to(weights[0].dtype)
    for i in range(candidates):
        powers = input_mean.double().pow(i / candidates).clamp(min=_SMALLEST)
        middle = (powers[~dead].max() * powers[~dead].min()).sqrt()
        factor = (powers / middle).masked_fill(dead, 1).float()
        error = sum(_error(weight, factor, hessian, bits, group_size) for weight in weights)
        if error < best_error:
            best, best_error = factor, error
    return best


def _error(weight: Tensor, factor: Tensor, hessian: Tensor, bits: int, group_size: int | None) -> float:
    """tr(E H Eᵀ) of W [out, in] rounded to nearest under the factor [in]."""
    factor = factor.to(weight.dtype)
    scaled = weight * factor
    scale = weight_scale(scaled, bits, group_size)
    residual = dequantize(quantize(scaled, scale, bits), scale) / factor - weight
    return float(output_error(residual, hessian).sum())
