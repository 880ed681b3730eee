"""Law 2: GPTQ against rounding to nearest, and against brute force."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from omega_qvla.numerics import gptq as solver
from omega_qvla.numerics.gptq import gptq, gptq_blockwise, hessian_factor, round_with_factor
from omega_qvla.numerics.quantizer import ScaleSearch, dequantize, qmax, qmin, quantize, weight_scale
from omega_qvla.spec import Codes


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


def brute_force_blockwise(weight: Tensor, hessian: Tensor, bits: int, damping: float, codes: Codes) -> Tensor:
    """Every block of 128 columns by itself, each row of its inverse used as it is at first."""
    rounded = torch.empty_like(weight)
    for start in range(0, weight.shape[1], 128):
        members = slice(start, start + 128)
        block, mine = weight[:, members].clone(), hessian[members, members]
        inverse = torch.linalg.inv(mine + damping * mine.diagonal().mean() * torch.eye(128, dtype=torch.float64))
        scale = weight_scale(block, bits, None, "mse_coarse", codes=codes)[:, 0]
        for j in range(128):
            code = (block[:, j] / scale).round().clamp(qmin(bits, codes), qmax(bits))
            error = (block[:, j] - code * scale) / inverse[j, j]
            block[:, j + 1 :] -= torch.outer(error, inverse[j, j + 1 :])
            rounded[:, start + j] = code
    return rounded


@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("group_size", [None, 16, 32])
@pytest.mark.parametrize("search", ["max", "mse", "mse_coarse"])
@pytest.mark.parametrize(("bits", "codes"), [(3, "full"), (4, "symmetric")])
def test_without_correlations_it_rounds_to_nearest(
    width: int, group_size: int | None, search: ScaleSearch, bits: int, codes: Codes
) -> None:
    weight = random(24, width, seed=0)
    rounded, scale = gptq(weight, torch.eye(width), bits=bits, group_size=group_size, search=search, codes=codes)
    expected = weight_scale(weight, bits, group_size, search, codes=codes)
    assert torch.equal(scale, expected)
    assert torch.equal(rounded, quantize(weight, expected, bits, codes))


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


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_factor_of_a_hessian(overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "_BLOCK", 5)
    x = correlated_inputs(100, 12, seed=0)
    hessian = x.t() @ x
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    factor = hessian_factor(hessian, 0.05, overwrite=overwrite)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor @ factor.t(), damped, rtol=1e-12)


def test_single_precision_is_as_good() -> None:
    """What the widest layers are solved in: other codes here and there, and the same error of the output."""
    x, weight = correlated_inputs(400, 192, seed=0), random(32, 192, seed=1)
    errors = []
    for dtype in (torch.float64, torch.float32):
        factor = hessian_factor((x.t() @ x).to(dtype), 0.01)
        codes, scale = round_with_factor(weight, factor, bits=4, group_size=64, search="mse")
        errors.append(output_error(x, weight, codes, scale.double()))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("method", [gptq, gptq_blockwise])
@pytest.mark.parametrize("out", [1, 8])
def test_the_arguments_are_left_alone(method: Callable[..., object], out: int) -> None:
    x = correlated_inputs(300, 128, seed=0)
    weight, hessian = random(out, 128, seed=1), x.t() @ x
    before = weight.clone(), hessian.clone()
    method(weight, hessian, bits=4)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_full_codes_use_the_lowest_one_too() -> None:
    weight, x = random(32, 64, seed=1), correlated_inputs(300, 64, seed=0)
    symmetric, _ = gptq(weight, x.t() @ x, bits=3, group_size=16, search="mse")
    full, _ = gptq(weight, x.t() @ x, bits=3, group_size=16, search="mse", codes="full")
    assert symmetric.min() == -3 and symmetric.max() == 3
    assert full.min() == -4 and full.max() == 3


@pytest.mark.parametrize("codes", ["symmetric", "full"])
def test_blockwise_without_correlations_rounds_to_nearest(codes: Codes) -> None:
    weight = random(24, 256, seed=0)
    rounded, scale = gptq_blockwise(weight, torch.eye(256), bits=4, codes=codes)
    expected = weight_scale(weight, 4, 128, "mse_coarse", codes=codes)
    assert torch.equal(scale, expected) and scale.shape == (24, 2)
    assert torch.equal(rounded, quantize(weight, expected, 4, codes))


@pytest.mark.parametrize("codes", ["symmetric", "full"])
def test_blockwise_is_its_definition(codes: Codes) -> None:
    weight, x = random(6, 256, seed=1), correlated_inputs(600, 256, seed=2)
    rounded, _ = gptq_blockwise(weight, x.t() @ x, bits=4, damping=0.05, codes=codes)
    expected = brute_force_blockwise(weight, x.t() @ x, 4, 0.05, codes)
    assert (rounded.double() == expected).double().mean() > 0.999  # ties at .5 may round either way


def test_blockwise_starts_like_gptq() -> None:
    """Only from the third column on does it matter that the inverse is not updated."""
    weight, x = random(64, 128, seed=1), correlated_inputs(300, 128, seed=2)
    blockwise, scale = gptq_blockwise(weight, x.t() @ x, bits=4)
    whole, same = gptq(weight, x.t() @ x, bits=4, search="mse_coarse")
    assert torch.equal(scale, same)
    assert torch.equal(blockwise[:, :2], whole[:, :2])
    assert not torch.equal(blockwise, whole)


def test_blocks_do_not_know_each_other() -> None:
    weight, x = random(8, 256, seed=1), correlated_inputs(600, 256, seed=2)
    codes, scale = gptq_blockwise(weight, x.t() @ x, bits=4)
    for block in (slice(0, 128), slice(128, 256)):
        alone = gptq_blockwise(weight[:, block], x[:, block].t() @ x[:, block], bits=4)
        assert torch.equal(alone[0], codes[:, block])
        assert torch.equal(alone[1][:, 0], scale[:, block.start // 128])


@pytest.mark.parametrize("seed", range(3))
def test_blockwise_output_error_is_between_rounding_and_gptq(seed: int) -> None:
    weight, x = random(16, 256, seed=seed), correlated_inputs(600, 256, seed=seed + 50)
    scale = weight_scale(weight, 4, 128, "mse_coarse")
    nearest = output_error(x, weight, quantize(weight, scale, 4), scale)
    blockwise = output_error(x, weight, *gptq_blockwise(weight, x.t() @ x, bits=4))
    whole = output_error(x, weight, *gptq(weight, x.t() @ x, bits=4, group_size=128, search="mse_coarse"))
    assert whole < blockwise < nearest


def test_blocks_that_never_carried_anything_are_rounded_for_themselves() -> None:
    weight, x = random(8, 256, seed=1), correlated_inputs(600, 256, seed=2)
    x[:, :128] = 0
    codes, scale = gptq_blockwise(weight, x.t() @ x, bits=4)
    assert torch.equal(codes[:, :128], quantize(weight[:, :128], scale[:, :1], 4))


@pytest.mark.parametrize("width", [64, 192])
def test_blockwise_refuses_what_is_not_made_of_blocks(width: int) -> None:
    with pytest.raises(ValueError, match=f"blocks of 128 columns do not divide an input of {width}: use rounding"):
        gptq_blockwise(torch.ones(2, width), torch.eye(width), bits=4)


@pytest.mark.parametrize("method", [gptq, gptq_blockwise])
def test_a_hessian_that_is_not_positive_definite_is_refused(method: Callable[..., object]) -> None:
    hessian = torch.eye(128)
    hessian[0, 1] = hessian[1, 0] = 2
    with pytest.raises(ValueError, match=r"not positive definite with damping 0\.01: raise `weight.damping`, or"):
        method(torch.ones(2, 128), hessian, bits=4, damping=0.01)
    method(torch.ones(2, 128), hessian, bits=4, damping=1.5)


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


def test_the_output_search_is_refused() -> None:
    with pytest.raises(ValueError, match="scale search 'output' is for rounding 'rtn'"):
        gptq(torch.ones(2, 8), torch.eye(8), bits=4, search="output")
