import pytest
import scipy.linalg
import torch

from omega_qvla.numerics.rotation import (
    apply_blocks,
    hadamard,
    hadamard_transform,
    left_singular_vectors,
    rotation_blocks,
)

KINDS = ("none", "svd", "hadamard", "svd_hadamard")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128])
def test_hadamard_is_scipys(size: int) -> None:
    expected = torch.from_numpy(scipy.linalg.hadamard(size).astype("float64")) / size**0.5
    assert torch.allclose(hadamard(size), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [0, 3, 48])
def test_hadamard_of_other_sizes_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"power of two of rows, not {size}"):
        hadamard(size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", [5, 200])
def test_blocks_are_orthogonal(kind: str, out: int) -> None:
    blocks = rotation_blocks(kind, random(out, 96), 32)  # type: ignore[arg-type]
    assert blocks.shape == (3, 32, 32)
    identity = torch.eye(32, dtype=torch.float64).expand(3, -1, -1)
    assert torch.allclose(blocks @ blocks.mT, identity, atol=1e-12)


def test_left_singular_vectors_are_the_decompositions() -> None:
    weight = random(100, 64)
    vectors = left_singular_vectors(weight, 16)
    for index, block in enumerate(weight.split(16, dim=1)):
        expected, strengths, _ = torch.linalg.svd(block.t(), full_matrices=False)
        assert torch.allclose((expected.t() @ vectors[index]).abs(), torch.eye(16).double(), atol=1e-9)
        assert torch.allclose((block @ vectors[index]).norm(dim=0), strengths)  # descending, as svd's are


def test_signs_are_fixed() -> None:
    weight = random(100, 64)
    vectors = left_singular_vectors(weight, 16)
    assert torch.equal(vectors, left_singular_vectors(weight.clone(), 16))
    assert torch.allclose(vectors, left_singular_vectors(-weight, 16))
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()


def test_svd_hadamard_is_the_product_of_its_halves() -> None:
    weight = random(40, 32)
    product = rotation_blocks("svd", weight, 16) @ rotation_blocks("hadamard", weight, 16)
    assert torch.equal(rotation_blocks("svd_hadamard", weight, 16), product)


def test_svd_hadamard_spreads_the_energy_of_a_block_evenly() -> None:
    """Every rotated channel gets the mean of the squared singular values (Ω-QVLA Eq. 5)."""
    weight = random(50, 16) * torch.logspace(0, 3, 16, dtype=torch.float64)
    energy = apply_blocks(weight, rotation_blocks("svd_hadamard", weight, 16)).square().sum(0)
    assert torch.allclose(energy, energy.mean().expand(16), rtol=1e-9)


def test_apply_blocks_is_the_block_diagonal_product() -> None:
    x, blocks = random(2, 3, 24), random(3, 8, 8)
    assert torch.allclose(apply_blocks(x, blocks), x @ torch.block_diag(*blocks))


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_hadamard_transform_is_the_product_with_hadamard_matrices(size: int) -> None:
    x = random(3, 2, 64)
    product = apply_blocks(x, hadamard(size).expand(64 // size, -1, -1))
    assert torch.allclose(hadamard_transform(x, size), product, rtol=0, atol=1e-14)


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 16 channels do not divide an input of 24"):
        rotation_blocks("svd", random(4, 24), 16)
