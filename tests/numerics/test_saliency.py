"""The scale search of AWQ against brute force over its grid, and against rounding to nearest."""

import pytest
import torch
from torch import Tensor

from omega_qvla.numerics.quantizer import dequantize, quantize, weight_scale
from omega_qvla.numerics.saliency import searched_factor


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed_inputs(tokens: int, width: int, seed: int) -> Tensor:
    """Channels of very different size, correlated."""
    return (random(tokens, width, seed=seed) + random(tokens, 1, seed=seed + 1)) * random(width, seed=seed + 2).exp()


def error_of(x: Tensor, weights: list[Tensor], factor: Tensor, bits: int, group_size: int | None) -> float:
    """Of all outputs, computed token by token."""
    total = 0.0
    for weight in weights:
        scale = weight_scale(weight * factor, bits, group_size)
        rounded = dequantize(quantize(weight * factor, scale, bits), scale)
        total += float(((x / factor) @ rounded.t() - x @ weight.t()).square().sum())
    return total


def grid(mean: Tensor, candidates: int) -> list[Tensor]:
    factors = [mean.pow(i / candidates).clamp(min=1e-4) for i in range(candidates)]
    return [(factor / (factor.max() * factor.min()).sqrt()).float() for factor in factors]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("group_size", [None, 8])
def test_it_is_the_best_of_its_grid(seed: int, group_size: int | None) -> None:
    x, weights = skewed_inputs(100, 32, seed), [random(16, 32, seed=10), random(8, 32, seed=11)]
    mean = x.abs().mean(0)
    factor = searched_factor(mean, weights, x.t() @ x, bits=4, group_size=group_size)
    assert factor.dtype == torch.float32 and factor.shape == (32,)
    errors = [error_of(x, weights, candidate, 4, group_size) for candidate in grid(mean, 20)]
    assert error_of(x, weights, factor, 4, group_size) == pytest.approx(min(errors), rel=1e-9)


def test_powers_are_clipped() -> None:
    x, weights = skewed_inputs(100, 32, 1), [random(16, 32, seed=10)]
    x[:, 5] *= 1e-30
    mean = x.abs().mean(0)
    factor = searched_factor(mean, weights, x.t() @ x, bits=4, group_size=None)
    best = min(grid(mean, 20), key=lambda candidate: error_of(x, weights, candidate, 4, None))
    assert torch.allclose(factor, best)
    assert 1e3 < factor.max() / factor.min() < 1e6


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
def test_it_is_never_worse_than_rounding_to_nearest(bits: int, group_size: int | None) -> None:
    for seed in range(5):
        x, weights = skewed_inputs(200, 64, seed), [random(32, 64, seed=seed + 20) ** 3]
        factor = searched_factor(x.abs().mean(0), weights, x.t() @ x, bits=bits, group_size=group_size)
        nearest = error_of(x, weights, torch.ones(64), bits, group_size)
        assert error_of(x, weights, factor, bits, group_size) <= nearest * (1 + 1e-9)


def test_a_salient_channel_gets_a_larger_factor() -> None:
    x = random(200, 64, seed=0)
    x[:, 7] *= 50
    weights = [random(32, 64, seed=1)]
    factor = searched_factor(x.abs().mean(0), weights, x.t() @ x, bits=4, group_size=None)
    assert factor[7] > 2 * factor[torch.arange(64) != 7].max()
    assert error_of(x, weights, factor, 4, None) < 0.5 * error_of(x, weights, torch.ones(64), 4, None)


def test_equal_channels_get_no_factor() -> None:
    x = random(200, 32, seed=0)
    factor = searched_factor(torch.full((32,), 3.0), [random(16, 32, seed=1)], x.t() @ x, bits=4, group_size=8)
    assert torch.allclose(factor, torch.ones(32))


def test_one_candidate_is_rounding_to_nearest() -> None:
    x = skewed_inputs(100, 32, 0)
    arguments = x.abs().mean(0), [random(16, 32, seed=1)], x.t() @ x
    assert torch.equal(searched_factor(*arguments, bits=4, group_size=8, candidates=1), torch.ones(32))


def test_dead_channels_keep_one_and_do_not_move_the_others() -> None:
    x = skewed_inputs(100, 32, 0)
    weights = [random(16, 32, seed=1)]
    alive = searched_factor(x.abs().mean(0), weights, x.t() @ x, bits=4, group_size=None)
    wider, padded = torch.cat([x, torch.zeros(100, 2)], 1), [torch.cat([weights[0], torch.zeros(16, 2)], 1)]
    factor = searched_factor(wider.abs().mean(0), padded, wider.t() @ wider, bits=4, group_size=None)
    assert factor[32:].tolist() == [1, 1]
    assert torch.equal(factor[:32], alive)


def test_the_size_of_the_input_does_not_matter() -> None:
    x, weights = skewed_inputs(100, 32, 0), [random(16, 32, seed=1)]
    factor = searched_factor(x.abs().mean(0), weights, x.t() @ x, bits=4, group_size=8)
    scaled = searched_factor(1024 * x.abs().mean(0), weights, x.t() @ x, bits=4, group_size=8)
    assert torch.allclose(factor, scaled)


def test_inputs_without_anything_are_refused() -> None:
    with pytest.raises(ValueError, match="the layer saw no calibration input"):
        searched_factor(torch.zeros(8), [torch.ones(2, 8)], torch.zeros(8, 8), bits=4, group_size=None)


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="the Hessian is not finite"):
        searched_factor(torch.ones(8), [torch.ones(2, 8)], torch.full((8, 8), torch.nan), bits=4, group_size=None)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 3 channels do not divide an input of 8"):
        searched_factor(torch.ones(8), [torch.ones(2, 8)], torch.eye(8), bits=4, group_size=3)
