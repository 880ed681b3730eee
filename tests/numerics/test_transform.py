"""Law 1: a transform changes nothing in real arithmetic."""

from itertools import product

import pytest
import torch
from torch import Tensor

from omega_qvla.numerics.transform import ROTATION_DTYPE, Transform, fit_transform

WIDTH, BLOCK = 64, 16
COMBINATIONS = list(product(("none", "svd", "hadamard", "svd_hadamard"), (False, True), (False, True), (False, True)))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(rotation: str, balance: bool, smooth: bool, fold: bool) -> tuple[Transform, Tensor]:
    weight = random(48, WIDTH, seed=0) * random(WIDTH, seed=1).exp()
    smoothing = random(WIDTH, seed=2).exp() if smooth else None
    transform = fit_transform(
        weight,
        rotation=rotation,  # type: ignore[arg-type]
        block_size=BLOCK,
        balance=balance,
        smoothing=smoothing,
    )
    return transform.with_folded(random(WIDTH, seed=3).exp()) if fold else transform, weight


@pytest.mark.parametrize(("rotation", "balance", "smooth", "fold"), COMBINATIONS)
def test_the_product_is_unchanged(rotation: str, balance: bool, smooth: bool, fold: bool) -> None:
    transform, weight = fitted(rotation, balance, smooth, fold)
    x = random(20, WIDTH, seed=4)
    exact = x @ weight.t()
    error = (transform.apply(x) @ transform.fold(weight).t() - exact).norm() / exact.norm()
    assert error < 1e-9


@pytest.mark.parametrize(("rotation", "balance", "smooth", "fold"), COMBINATIONS)
def test_the_hessian_is_that_of_the_transformed_input(rotation: str, balance: bool, smooth: bool, fold: bool) -> None:
    transform, _ = fitted(rotation, balance, smooth, fold)
    x = random(100, WIDTH, seed=5)
    transformed = transform.apply(x)
    assert torch.allclose(transform.hessian(x.t() @ x), transformed.t() @ transformed, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize(("rotation", "balance", "smooth", "fold"), COMBINATIONS)
def test_the_order_of_what_happens(rotation: str, balance: bool, smooth: bool, fold: bool) -> None:
    """Division by smoothing, permutation, rotation, division by the folded factor."""
    transform, _ = fitted(rotation, balance, smooth, fold)
    x = random(20, WIDTH, seed=4)
    expected = x if transform.smoothing is None else x / transform.smoothing.double()
    if transform.permutation is not None:
        expected = expected[:, transform.permutation.long()]
    bare = Transform(BLOCK, transform.rotation, matrices=transform.matrices)
    expected = expected @ torch.block_diag(*bare.blocks(WIDTH))
    if transform.folded is not None:
        expected = expected / transform.folded.double()
    assert torch.allclose(transform.apply(x), expected)


@pytest.mark.parametrize("rotation", ["svd", "svd_hadamard"])
def test_stored_matrices_are_nearly_orthogonal(rotation: str) -> None:
    matrices = fitted(rotation, True, False, False)[0].matrices
    assert matrices is not None and matrices.dtype == ROTATION_DTYPE
    gram = matrices.double() @ matrices.double().mT
    assert torch.allclose(gram, torch.eye(BLOCK).double().expand_as(gram), atol=0.02)


def test_only_what_cannot_be_derived_is_stored() -> None:
    transform = fitted("hadamard", False, False, False)[0]
    assert transform.matrices is None and not transform.is_identity
    assert fitted("none", False, False, False)[0].is_identity


def test_linears_are_fitted_to_the_smoothed_weight() -> None:
    weight, smoothing = random(32, WIDTH, seed=6), random(WIDTH, seed=7).exp().float()
    of_smoothed = fit_transform(weight * smoothing, rotation="svd", block_size=BLOCK, balance=True)
    smoothed = fit_transform(weight, rotation="svd", block_size=BLOCK, balance=True, smoothing=smoothing)
    assert of_smoothed.permutation is not None and smoothed.permutation is not None
    assert torch.equal(of_smoothed.permutation, smoothed.permutation)
    assert of_smoothed.matrices is not None and smoothed.matrices is not None
    assert torch.equal(of_smoothed.matrices, smoothed.matrices)


def test_identity_of_a_width_that_blocks_do_not_divide() -> None:
    weight = random(7, 10, seed=0)
    transform = fit_transform(weight, rotation="none", block_size=64, balance=False)
    assert torch.equal(transform.fold(weight), weight)
    assert torch.equal(transform.apply(weight), weight)


@pytest.mark.parametrize(("rotation", "balance"), [("svd", False), ("hadamard", False), ("none", True)])
def test_blocks_that_do_not_divide_are_refused(rotation: str, balance: bool) -> None:
    with pytest.raises(ValueError, match="blocks of 48 channels do not divide an input of 64"):
        fit_transform(torch.ones(2, 64), rotation=rotation, block_size=48, balance=balance)  # type: ignore[arg-type]


def test_smoothing_alone_with_blocks_that_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 48 channels do not divide an input of 64"):
        fit_transform(torch.ones(2, 64), rotation="none", block_size=48, balance=False, smoothing=torch.ones(64))
