"""Moving the difficulty from activations into weights (SmoothQuant Eq. 4)."""

from __future__ import annotations

from torch import Tensor

_SMALLEST, _LARGEST = 1e-3, 1e3


def smoothing_factor(input_peak: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Λ [in] = peak(X_j)^α / peak(W_j)^(1-α), by which input channel j is divided, clipped to [1e-3, 1e3].

    `input_peak` [in]: largest |X_j| over the calibration tokens. `weight` [out, in]: all linears that read
    the input, stacked. A channel that is always zero on either side keeps the factor 1.
    """
    weight_peak = weight.abs().amax(0).to(input_peak.dtype)
    dead = (input_peak == 0) | (weight_peak == 0)
    factor = input_peak.pow(alpha) / weight_peak.masked_fill(dead, 1).pow(1 - alpha)
    return factor.clamp(_SMALLEST, _LARGEST).masked_fill(dead, 1)
