"""Orthogonal matrices per block of input channels, R̂ = diag(R_1 ... R_K) (Ω-QVLA Eq. 3-5).

Blocks are a tensor [K, c, c]; row vectors are multiplied from the right: x_b R_b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.spec import Rotation


def hadamard(size: int) -> Tensor:
    """The normalized Sylvester-Hadamard matrix, float64 [size, size]; symmetric and orthogonal.

    Raises `ValueError` if the size is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Sylvester-Hadamard matrix has a power of two of rows, not {size}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / size**0.5


def hadamard_transform(x: Tensor, size: int) -> Tensor:
    """x [..., in] times diag(H ... H) with H = `hadamard(size)`, in x's dtype.

    By sums and differences of pairs, in the order in which the compiled kernels make them: the same bits.
    """
    found, half = x, 1
    while half < size:
        low, high = found.reshape(-1, 2, half).unbind(1)
        found, half = torch.stack((low + high, low - high), 1), 2 * half
    return found.reshape(x.shape) * (1 / size**0.5)


def left_singular_vectors(weight: Tensor, block_size: int) -> Tensor:
    """U_b of every block of input channels of W [out, in], float64 [K, c, c], strongest direction first.

    The left singular vectors of a block [c, out] are the eigenvectors of its c x c Gram matrix, which is far
    cheaper than the decomposition. A vector's sign is free: its largest entry is made positive, so that the
    same weight gives the same rotation on every machine.
    """
    blocks = weight.double().unflatten(1, (-1, block_size)).transpose(0, 1)  # [K, out, c]
    _, vectors = torch.linalg.eigh(blocks.mT @ blocks)
    vectors = vectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def rotation_blocks(kind: Rotation, weight: Tensor, block_size: int) -> Tensor:
    """R_b for every block of input channels of W [out, in], float64 [K, c, c].

    `svd_hadamard` is the paper's U_b H_c; `svd` and `hadamard` are its two halves.
    """
    count = weight.shape[1] // block_size
    if count * block_size != weight.shape[1]:
        raise ValueError(f"blocks of {block_size} channels do not divide an input of {weight.shape[1]}")
    if kind == "none":
        return torch.eye(block_size, dtype=torch.float64).expand(count, -1, -1)
    if kind == "hadamard":
        return hadamard(block_size).expand(count, -1, -1)
    vectors = left_singular_vectors(weight, block_size)
    return vectors if kind == "svd" else vectors @ hadamard(block_size)


def apply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x [..., in] times diag(blocks [K, c, c]), in x's dtype."""
    count, size, _ = blocks.shape
    grouped = x.reshape(-1, count, size).transpose(0, 1)
    return torch.bmm(grouped, blocks.to(x.dtype)).transpose(0, 1).reshape(x.shape)


def output_rotation(kind: Rotation, weight: Tensor, block_size: int) -> Tensor:
    """B_b for every block of output channels of W [out, in], float64 [out / c, c, c] with c at most `block_size`.

    The rotated weight S_bᵀ W_b gives y S_b; y = (y S_b) B_b with B_b = S_bᵀ brings it back (DuQuant's row
    rotation). A layer with fewer outputs than `block_size` is one block.
    """
    size = min(block_size, len(weight))
    return rotation_blocks(kind, weight.t(), size).mT


def rotate_outputs(weight: Tensor, back: Tensor) -> Tensor:
    """W'' [out, in], float64, with (x W''ᵀ) B = x Wᵀ for W [out, in] and the blocks B [out / c, c, c]."""
    return apply_blocks(weight.double().t(), torch.linalg.inv(back.double())).t()
