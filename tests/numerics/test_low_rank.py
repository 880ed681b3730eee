"""The low-rank branch against Eckart-Young: no product of that rank leaves less."""

import pytest
import torch

from omega_qvla.numerics.low_rank import low_rank


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 8)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_what_remains_are_the_singular_values_that_are_left(shape: tuple[int, int], rank: int) -> None:
    weight = random(*shape, seed=0)
    up, down = low_rank(weight, rank)
    assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
    left = torch.linalg.svdvals(weight)[rank:]
    assert torch.allclose((weight - up @ down).square().sum(), left.square().sum(), atol=1e-20)
    if rank < min(shape):
        assert torch.allclose(torch.linalg.matrix_norm(weight - up @ down, 2), left[0])


@pytest.mark.parametrize("seed", range(5))
def test_no_other_product_of_that_rank_leaves_less(seed: int) -> None:
    """Against the best W' [out, in] whose rows lie in a random space of that rank."""
    weight = random(16, 24, seed=seed)
    up, down = low_rank(weight, 4)
    basis = torch.linalg.qr(random(24, 4, seed=seed + 10)).Q
    other = weight @ basis @ basis.t()
    assert (weight - up @ down).norm() <= (weight - other).norm()


def test_a_weight_of_that_rank_is_taken_whole() -> None:
    weight = random(16, 3, seed=0) @ random(3, 24, seed=1)
    up, down = low_rank(weight, 3)
    assert torch.allclose(up @ down, weight)


def test_both_factors_take_the_same_share() -> None:
    up, down = low_rank(random(16, 24, seed=0), 4)
    values = torch.linalg.svdvals(random(16, 24, seed=0))[:4]
    assert torch.allclose(up.t() @ up, values.diag())
    assert torch.allclose(down @ down.t(), values.diag())


def test_factors_are_double_and_the_weight_is_left_alone() -> None:
    weight = random(6, 8, seed=0).float()
    before = weight.clone()
    up, down = low_rank(weight, 2)
    assert up.dtype == down.dtype == torch.float64
    assert torch.equal(weight, before)


@pytest.mark.parametrize("rank", [-1, 0, 7])
def test_ranks_that_do_not_exist_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} of a weight \[6, 8\] is outside 1 ... 6"):
        low_rank(torch.ones(6, 8), rank)
