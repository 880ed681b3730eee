"""The composed transform of an input site and its exact inverse on the weights (Ω-QVLA Eq. 6-7, QuantVLA Eq. 25).

Whatever comes before rounding (smoothing, rotations, permutation, a folded factor per channel) runs as at most
one matrix per block, one permutation, and one more matrix per block, however it is composed. What has to be
stored depends on the composition: a Hadamard matrix is known, a factor per channel is a vector, only rotations
that depend on the weights are matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from omega_qvla.numerics.permutation import interleaved, zigzag
from omega_qvla.numerics.rotation import apply_blocks, hadamard, rotation_blocks
from omega_qvla.spec import Rotation

ROTATION_DTYPE = torch.bfloat16
"""Rotations are stored in two bytes. Weights are folded with the inverse of what is stored: nothing is lost."""

_ROWS = 1024
"""Rows of a Hessian that are transformed at a time."""

Permutation = Literal["none", "zigzag", "interleaved"]


@dataclass(frozen=True)
class Stages:
    """A transform as it runs: X' = (X · before)[:, order] · after. What is None is not done."""

    before: Tensor | None
    """Factor per channel [in], or matrix per block [K, c, c], float64."""
    order: Tensor | None
    """int64 [in]"""
    after: Tensor | None
    """As `before`."""

    def apply(self, x: Tensor) -> Tensor:
        """X' [..., in] of X [..., in], in its dtype."""
        if self.before is not None:
            x = times(x, self.before)
        if self.order is not None:
            x = x[..., self.order]
        return x if self.after is None else times(x, self.after)

    def inverse_transposed(self) -> Stages:
        """The stages that weights go through, so that X' W'ᵀ = X Wᵀ."""
        return Stages(_inverse_transposed(self.before), self.order, _inverse_transposed(self.after))


@dataclass(frozen=True)
class Transform:
    """X' = (X / smoothing · diag(first matrices))[:, permutation] · diag(matrices) / folded."""

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
    first_rotation: Rotation = "none"
    first_matrices: Tensor | None = None
    """As `matrices`, for the rotation before the permutation."""

    def stages(self, width: int) -> Stages:
        """How the transform of inputs [..., width] runs."""
        first = _known(self.first_rotation, self.first_matrices, self.block_size, width)
        last = _known(self.rotation, self.matrices, self.block_size, width)
        order = None if self.permutation is None else self.permutation.long()
        if self.smoothing is not None:
            divisor = self.smoothing.double()
            if first is not None:
                first = first / divisor.view(-1, self.block_size, 1)
            elif last is not None:  # division costs nothing as part of the rotation
                last = last / divisor[slice(None) if order is None else order].view(-1, self.block_size, 1)
            else:
                first = 1 / divisor
        if self.folded is not None:
            divisor = self.folded.double()
            last = 1 / divisor if last is None else last / divisor.view(-1, 1, self.block_size)
        return Stages(first, order, last)

    def apply(self, x: Tensor) -> Tensor:
        """X' [..., in] of X [..., in], in its dtype."""
        return self.stages(x.shape[-1]).apply(x)

    def fold(self, weight: Tensor) -> Tensor:
        """W' [out, in] with X' W'ᵀ = X Wᵀ for W [out, in], in its dtype."""
        return self.stages(weight.shape[1]).inverse_transposed().apply(weight)

    def hessian(self, hessian: Tensor) -> Tensor:
        """X'ᵀX' [in, in] from XᵀX [in, in], in its dtype; two matrices are in memory besides the argument,
        three with a first rotation."""
        stages = self.stages(len(hessian))
        half = _from_the_left(stages, hessian)
        half = half.t().contiguous()  # rows are gathered, and multiplied in blocks, where they lie together
        return _from_the_left(stages, half)

    def with_folded(self, factor: Tensor) -> Transform:
        """The same transform with output channel j also divided by factor[j] [in]."""
        return replace(self, folded=factor.float())


def fit_transform(
    weight: Tensor,
    *,
    rotation: Rotation,
    block_size: int,
    permutation: Permutation,
    smoothing: Tensor | None = None,
    first_rotation: Rotation = "none",
) -> Transform:
    """The transform for W [out, in], the stacked linears that read one input.

    `smoothing` [in] divides the input channels first; rotations and permutation are each fitted to the weights
    that the pieces before them leave.

    Raises `ValueError` if the blocks do not divide the input.
    """
    width = weight.shape[1]
    blocked = permutation != "none" or rotation != "none" or first_rotation != "none"
    if blocked and width % block_size:
        raise ValueError(f"blocks of {block_size} channels do not divide an input of {width}")
    fitted = Transform(block_size, smoothing=None if smoothing is None else smoothing.float())
    if first_rotation != "none":
        matrices = _fitted(first_rotation, fitted.fold(weight), block_size)
        fitted = replace(fitted, first_rotation=first_rotation, first_matrices=matrices)
    if permutation != "none":
        deal = zigzag if permutation == "zigzag" else interleaved
        fitted = replace(fitted, permutation=deal(fitted.fold(weight).square().sum(0), block_size).int())
    if rotation != "none":
        fitted = replace(fitted, rotation=rotation, matrices=_fitted(rotation, fitted.fold(weight), block_size))
    return fitted


def _from_the_left(stages: Stages, x: Tensor) -> Tensor:
    """What the stages do to columns, done to the rows of X [in, columns]: the transposed of `apply` on Xᵀ."""
    if stages.before is not None and stages.before.dim() == 3:
        x = _from_the_left(Stages(None, None, stages.before), x)
        stages = replace(stages, before=None)
    after = stages.after
    rows = _ROWS if after is None or after.dim() == 1 else max(_ROWS, after.shape[1])
    result = torch.empty_like(x)
    for start in range(0, len(x), rows):
        taken = slice(start, start + rows) if stages.order is None else stages.order[start : start + rows]
        part = x[taken]
        if stages.before is not None:
            part = part * stages.before[taken, None].to(x.dtype)
        if after is not None and after.dim() == 3:
            size = after.shape[1]
            blocks = after[start // size : (start + rows) // size].to(x.dtype)
            part = torch.bmm(blocks.mT, part.reshape(len(blocks), size, -1)).view_as(part)
        elif after is not None:
            part = part * after[start : start + rows, None].to(x.dtype)
        result[start : start + rows] = part
    return result


def times(x: Tensor, factor: Tensor) -> Tensor:
    """x [..., in] times a factor per channel [in] or a matrix per block [K, c, c], in x's dtype."""
    return x * factor.to(x.dtype) if factor.dim() == 1 else apply_blocks(x, factor)


def _fitted(kind: Rotation, weight: Tensor, block_size: int) -> Tensor | None:
    """What has to be stored of a rotation fitted to W [out, in]."""
    return rotation_blocks(kind, weight, block_size).to(ROTATION_DTYPE) if "svd" in kind else None


def _known(kind: Rotation, matrices: Tensor | None, size: int, width: int) -> Tensor | None:
    if kind == "none":
        return None
    return hadamard(size).expand(width // size, -1, -1) if matrices is None else matrices.double()


def _inverse_transposed(factor: Tensor | None) -> Tensor | None:
    if factor is None:
        return None
    return 1 / factor if factor.dim() == 1 else torch.linalg.inv(factor).mT
