"""The composed transform of an input site and its exact inverse on the weights (Ω-QVLA Eq. 6-7).

Whatever comes before rounding (smoothing, permutation, rotation, a folded factor per channel) is one
permutation and one matrix per block, so it costs the same at run time however it is composed. What has to be
stored depends on the composition: a Hadamard matrix is known, a factor per channel is a vector, only rotations
that depend on the weights are matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omega_qvla.numerics.permutation import zigzag
from omega_qvla.numerics.rotation import Rotation, apply_blocks, hadamard, rotation_blocks

ROTATION_DTYPE = torch.bfloat16
"""Rotations are stored in two bytes. Weights are folded with the inverse of what is stored: nothing is lost."""


@dataclass(frozen=True)
class Transform:
    """X' = (X / smoothing)[:, permutation] · diag(R_1 ... R_K) / folded. What is None is not done."""

    block_size: int
    rotation: Rotation = "none"
    permutation: Tensor | None = None
    """int32 [in]"""
    matrices: Tensor | None = None
    """The rotations that depend on weights, ROTATION_DTYPE [K, c, c]; with `svd` and `svd_hadamard`."""
    smoothing: Tensor | None = None
    """float32 [in]"""
    folded: Tensor | None = None
    """float32 [in]"""

    @property
    def is_identity(self) -> bool:
        parts = (self.permutation, self.smoothing, self.folded)
        return self.rotation == "none" and all(part is None for part in parts)

    def order(self, width: int) -> Tensor:
        """The permutation as an index, int64 [in]."""
        return torch.arange(width) if self.permutation is None else self.permutation.long()

    def blocks(self, width: int) -> Tensor:
        """Everything but the permutation as one matrix per block, float64 [K, c, c]."""
        size = self.block_size
        if self.matrices is not None:
            blocks = self.matrices.double()
        else:
            known = hadamard(size) if self.rotation == "hadamard" else torch.eye(size, dtype=torch.float64)
            blocks = known.expand(width // size, -1, -1)
        if self.smoothing is not None:
            blocks = blocks / self.smoothing.double()[self.order(width)].view(-1, size, 1)
        if self.folded is not None:
            blocks = blocks / self.folded.double().view(-1, 1, size)
        return blocks

    def apply(self, x: Tensor) -> Tensor:
        """X' [..., in] of X [..., in], in its dtype."""
        if self.is_identity:
            return x
        return apply_blocks(x[..., self.order(x.shape[-1])], self.blocks(x.shape[-1]))

    def fold(self, weight: Tensor) -> Tensor:
        """W' [out, in] with X' W'ᵀ = X Wᵀ for W [out, in], float64."""
        if self.is_identity:
            return weight.double()
        width = weight.shape[1]
        inverse = torch.linalg.inv(self.blocks(width)).mT
        return apply_blocks(weight.double()[:, self.order(width)], inverse)

    def hessian(self, hessian: Tensor) -> Tensor:
        """X'ᵀX' [in, in] from XᵀX [in, in], float64."""
        if self.is_identity:
            return hessian.double()
        order, blocks = self.order(len(hessian)), self.blocks(len(hessian))
        half = apply_blocks(hessian.double()[order][:, order], blocks)
        return apply_blocks(half.mT, blocks)

    def with_folded(self, factor: Tensor) -> Transform:
        """The same transform with output channel j also divided by factor[j] [in]."""
        return replace(self, folded=factor.float())


def fit_transform(
    weight: Tensor, *, rotation: Rotation, block_size: int, balance: bool, smoothing: Tensor | None = None
) -> Transform:
    """The transform for W [out, in], the stacked linears that read one input.

    `smoothing` [in] divides the input channels first; permutation and rotation are fitted to the weights that
    then remain.

    Raises `ValueError` if the blocks do not divide the input.
    """
    width = weight.shape[1]
    if (balance or rotation != "none" or smoothing is not None) and width % block_size:
        raise ValueError(f"blocks of {block_size} channels do not divide an input of {width}")
    weight = weight.double()
    if smoothing is not None:
        smoothing = smoothing.float()
        weight = weight * smoothing.double()
    permutation = zigzag(weight.square().sum(0), block_size).int() if balance else None
    fitted = Transform(block_size, rotation, permutation, None, smoothing)
    if rotation in ("svd", "svd_hadamard"):
        matrices = rotation_blocks(rotation, weight[:, fitted.order(width)], block_size)
        fitted = replace(fitted, matrices=matrices.to(ROTATION_DTYPE))
    return fitted
