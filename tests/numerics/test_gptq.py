"""Law 2: GPTQ against rounding to nearest, and against brute force."""

import pytest
import torch
from torch import Tensor

from omega_qvla.numerics.gptq import gptq, inverse_factor
from omega_qvla.numerics.quantizer import dequantize, qmax, quantize, weight_scale


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated_inputs(tokens: int, width: int, seed: int) -> Tensor:
    return random(tokens, width, seed=seed) @ random(width, width, seed=seed + 1) + random(width, seed=seed + 2)


def output_error(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> float:
    return float((x @ (dequantize(codes, scale) - weight).t()).square().sum())


def brute_force(weight: Tensor, hessian: Tensor, bits: int, group: int, damping: float) -> Tensor:
    """Optimal-brain quantization column by column, the remaining Hessian inverted afresh for every column."""
    width = weight.shape[1]
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    remaining, codes, scale = weight.clone(), torch.zeros_like(weight), torch.zeros(0)
    for j in range(width):
        if j % group == 0:
            scale = weight_scale(remaining[:, j : j + group], bits)[:, 0]
        codes[:, j] = (remaining[:, j] / scale).round().clamp(-qmax(bits), qmax(bits))
        inverse = torch.linalg.inv(damped[j:, j:])
        error = (remaining[:, j] - codes[:, j] * scale) / inverse[0, 0]
        remaining[:, j:] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("group_size", [None, 16, 32])
@pytest.mark.parametrize("search", ["max", "mse"])
@pytest.mark.parametrize("bits", [3, 4])
def test_without_correlations_it_rounds_to_nearest(
    width: int, group_size: int | None, search: str, bits: int
) -> None:
    weight = random(24, width, seed=0)
    codes, scale = gptq(
        weight,
        torch.eye(width),
        bits=bits,
        group_size=group_size,
        search=search,  # type: ignore[arg-type]
    )
    expected = weight_scale(weight, bits, group_size, search)  # type: ignore[arg-type]
    assert torch.equal(scale, expected)
    assert torch.equal(codes, quantize(weight, expected, bits))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("group_size", [None, 4])
def test_it_is_optimal_brain_quantization(seed: int, group_size: int | None) -> None:
    weight, x = random(8, 8, seed=seed), correlated_inputs(50, 8, seed=seed + 100)
    codes, _ = gptq(weight, x.t() @ x, bits=4, group_size=group_size, damping=0.01)
    expected = brute_force(weight, x.t() @ x, 4, group_size or 8, 0.01)
    assert torch.equal(codes.double(), expected)


def test_it_is_optimal_brain_quantization_across_blocks_of_columns() -> None:
    """Wider than the block of columns that is corrected lazily, with groups that straddle its border."""
    weight, x = random(4, 144, seed=1), correlated_inputs(400, 144, seed=2)
    for group_size in (None, 48, 24):
        codes, _ = gptq(weight, x.t() @ x, bits=4, group_size=group_size, damping=0.1)
        expected = brute_force(weight, x.t() @ x, 4, group_size or 144, 0.1)
        assert (codes.double() == expected).double().mean() > 0.999  # ties at .5 may round either way


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("seed", range(5))
def test_its_output_error_is_smaller(seed: int, group_size: int | None) -> None:
    weight, x = random(32, 64, seed=seed), correlated_inputs(300, 64, seed=seed + 50)
    scale = weight_scale(weight, 4, group_size)
    nearest = output_error(x, weight, quantize(weight, scale, 4), scale)
    assert output_error(x, weight, *gptq(weight, x.t() @ x, bits=4, group_size=group_size)) < nearest


def test_scales_can_be_stored_and_codes_fit() -> None:
    x = correlated_inputs(300, 64, seed=0)
    codes, scale = gptq(random(32, 64, seed=1), x.t() @ x, bits=3, group_size=16, search="mse")
    assert codes.dtype == torch.int8 and codes.abs().max() <= 3
    assert codes.shape == (32, 64) and scale.shape == (32, 4)
    assert torch.equal(scale, scale.bfloat16().double())


def test_dead_channels_are_rounded_for_themselves() -> None:
    x = correlated_inputs(100, 16, seed=0)
    x[:, [3, 8]] = 0
    weight = random(8, 16, seed=1)
    codes, scale = gptq(weight, x.t() @ x, bits=4)
    nearest = quantize(weight, scale, 4)
    assert torch.equal(codes[:, [3, 8]], nearest[:, [3, 8]])


def test_inverse_factor() -> None:
    x = correlated_inputs(100, 12, seed=0)
    hessian = x.t() @ x
    factor = inverse_factor(hessian, 0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.t() @ factor @ damped, torch.eye(12, dtype=torch.float64), atol=1e-8)


def test_the_arguments_are_left_alone() -> None:
    x = correlated_inputs(100, 16, seed=0)
    weight, hessian = random(8, 16, seed=1), x.t() @ x
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, bits=4)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(bad: float) -> None:
    hessian = torch.eye(8)
    hessian[2, 3] = bad
    with pytest.raises(ValueError, match="the Hessian is not finite"):
        gptq(torch.ones(2, 8), hessian, bits=4)


def test_a_hessian_of_zeros_is_refused() -> None:
    with pytest.raises(ValueError, match="the layer saw no calibration input"):
        gptq(torch.ones(2, 8), torch.zeros(8, 8), bits=4)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 3 channels do not divide an input of 8"):
        gptq(torch.ones(2, 8), torch.eye(8), bits=4, group_size=3)
