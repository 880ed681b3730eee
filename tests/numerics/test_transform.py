"""Law 1: a transform changes nothing in real arithmetic."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from omega_qvla.numerics.rotation import apply_blocks, hadamard, output_rotation, rotate_outputs
from omega_qvla.numerics.transform import ROTATION_DTYPE, Transform, fit_transform

WIDTH, BLOCK = 64, 16
COMBINATIONS = list(
    product(
        ["none", "svd", "hadamard", "svd_hadamard"],
        ["none", "zigzag", "interleaved"],
        ["none", "svd", "hadamard"],
        [False, True],
        [False, True],
    )
)
NAMES = ("rotation", "permutation", "first", "smooth", "fold")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(
    rotation: Any, permutation: Any = "none", first: Any = "none", smooth: bool = False, fold: bool = False
) -> tuple[Transform, Tensor]:
    weight = random(48, WIDTH, seed=0) * random(WIDTH, seed=1).exp()
    transform = fit_transform(
        weight,
        rotation=rotation,
        block_size=BLOCK,
        permutation=permutation,
        smoothing=random(WIDTH, seed=2).exp() if smooth else None,
        first_rotation=first,
    )
    return transform.with_folded(random(WIDTH, seed=3).exp()) if fold else transform, weight


@pytest.mark.parametrize(NAMES, COMBINATIONS)
def test_the_product_is_unchanged(rotation: str, permutation: str, first: str, smooth: bool, fold: bool) -> None:
    transform, weight = fitted(rotation, permutation, first, smooth, fold)
    x = random(20, WIDTH, seed=4)
    exact = x @ weight.t()
    error = (transform.apply(x) @ transform.fold(weight).t() - exact).norm() / exact.norm()
    assert error < 1e-9


@pytest.mark.parametrize(NAMES, COMBINATIONS)
def test_the_hessian_is_that_of_the_transformed_input(
    rotation: str, permutation: str, first: str, smooth: bool, fold: bool
) -> None:
    transform, _ = fitted(rotation, permutation, first, smooth, fold)
    x = random(100, WIDTH, seed=5)
    transformed = transform.apply(x)
    assert torch.allclose(transform.hessian(x.t() @ x), transformed.t() @ transformed, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize(NAMES, COMBINATIONS)
def test_the_order_of_what_happens(rotation: str, permutation: str, first: str, smooth: bool, fold: bool) -> None:
    """Division by smoothing, first rotation, permutation, rotation, division by the folded factor."""
    transform, _ = fitted(rotation, permutation, first, smooth, fold)
    expected = random(20, WIDTH, seed=4)
    if transform.smoothing is not None:
        expected = expected / transform.smoothing.double()
    expected = rotated(expected, transform.first_rotation, transform.first_matrices)
    if transform.permutation is not None:
        expected = expected[:, transform.permutation.long()]
    expected = rotated(expected, transform.rotation, transform.matrices)
    if transform.folded is not None:
        expected = expected / transform.folded.double()
    assert torch.allclose(transform.apply(random(20, WIDTH, seed=4)), expected)


def rotated(x: Tensor, kind: str, matrices: Tensor | None) -> Tensor:
    if kind == "none":
        return x
    blocks = hadamard(BLOCK).expand(WIDTH // BLOCK, -1, -1) if matrices is None else matrices.double()
    return x @ torch.block_diag(*blocks)


@pytest.mark.parametrize("rotation", ["svd", "svd_hadamard"])
def test_stored_matrices_are_nearly_orthogonal(rotation: str) -> None:
    matrices = fitted(rotation, "zigzag")[0].matrices
    assert matrices is not None and matrices.dtype == ROTATION_DTYPE
    gram = matrices.double() @ matrices.double().mT
    assert torch.allclose(gram, torch.eye(BLOCK).double().expand_as(gram), atol=0.02)


def test_only_what_cannot_be_derived_is_stored() -> None:
    transform = fitted("hadamard", first="hadamard")[0]
    assert transform.matrices is None and transform.first_matrices is None


def test_factors_alone_are_no_matrices() -> None:
    stages = fitted("none", smooth=True, fold=True)[0].stages(WIDTH)
    assert stages.before is not None and stages.before.shape == (WIDTH,)
    assert stages.after is not None and stages.after.shape == (WIDTH,)


def test_linears_are_fitted_to_the_smoothed_weight() -> None:
    weight, smoothing = random(32, WIDTH, seed=6), random(WIDTH, seed=7).exp().float()
    of_smoothed = fit_transform(weight * smoothing, rotation="svd", block_size=BLOCK, permutation="zigzag")
    smoothed = fit_transform(weight, rotation="svd", block_size=BLOCK, permutation="zigzag", smoothing=smoothing)
    assert of_smoothed.permutation is not None and smoothed.permutation is not None
    assert torch.equal(of_smoothed.permutation, smoothed.permutation)
    assert of_smoothed.matrices is not None and smoothed.matrices is not None
    assert torch.equal(of_smoothed.matrices, smoothed.matrices)


def test_identity_of_a_width_that_blocks_do_not_divide() -> None:
    weight = random(7, 10, seed=0)
    transform = fit_transform(weight, rotation="none", block_size=64, permutation="none")
    assert torch.equal(transform.fold(weight), weight)
    assert torch.equal(transform.apply(weight), weight)


@pytest.mark.parametrize("piece", [{"rotation": "svd"}, {"first_rotation": "hadamard"}, {"permutation": "zigzag"}])
def test_blocks_that_do_not_divide_are_refused(piece: dict[str, Any]) -> None:
    arguments = {"rotation": "none", "permutation": "none"} | piece
    with pytest.raises(ValueError, match="blocks of 48 channels do not divide an input of 64"):
        fit_transform(torch.ones(2, 64), block_size=48, **arguments)


@pytest.mark.parametrize("outputs", [16, 64, 128])
@pytest.mark.parametrize("kind", ["svd", "hadamard", "svd_hadamard"])
def test_outputs_are_rotated_and_brought_back(kind: Any, outputs: int) -> None:
    """DuQuant's row rotation; a layer with fewer outputs than a block is one block."""
    weight, x = random(outputs, WIDTH, seed=8), random(20, WIDTH, seed=9)
    back = output_rotation(kind, weight, 64).to(ROTATION_DTYPE)
    assert back.shape[-1] == min(outputs, 64)
    exact = x @ weight.t()
    error = apply_blocks(x @ rotate_outputs(weight, back).t(), back) - exact
    assert error.norm() < 1e-9 * exact.norm()
