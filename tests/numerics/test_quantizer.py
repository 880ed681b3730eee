"""The uniform quantizer against its definition (Ω-QVLA Eq. 8-9)."""

import pytest
import torch

from omega_qvla.numerics.quantizer import (
    SCALE_DTYPE,
    ScaleSearch,
    check_finite,
    dequantize,
    output_error,
    peak_scale,
    percentile,
    qmax,
    qmin,
    quantize,
    storable,
    weight_scale,
)
from omega_qvla.spec import Codes

BITS = range(2, 9)
FRACTIONS: dict[ScaleSearch, list[float]] = {
    "mse": [1 - i / 100 for i in range(51)],
    "mse_coarse": [1 / 0.5, 1 / 0.75, 1, 1 / 1.25, 1 / 1.5],
    "output": [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55],
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_by_hand() -> None:
    x = torch.tensor([[0.5, -1.4, 0.9, 3.5]])
    scale = peak_scale(x, 4)
    assert scale.tolist() == [[0.5]]
    codes = quantize(x, scale, 4)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[1, -3, 2, 7]]
    assert dequantize(codes, scale).tolist() == [[0.5, -1.5, 1.0, 3.5]]


def correlated_hessian(width: int, seed: int) -> torch.Tensor:
    x = random(4 * width, width, seed=seed) @ random(width, width, seed=seed + 1)
    return x.t() @ x


def errors_of(weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor | None, codes: Codes) -> torch.Tensor:
    """[rows, groups], group by group; without a Hessian that of the weights themselves."""
    residual = dequantize(quantize(weight, scale, 4, codes), scale) - weight
    size = weight.shape[1] // scale.shape[1]
    errors = torch.empty_like(scale)
    for g in range(scale.shape[1]):
        group = slice(g * size, (g + 1) * size)
        block = torch.eye(size, dtype=weight.dtype) if hessian is None else hessian[group, group]
        for row in range(len(weight)):
            errors[row, g] = residual[row, group] @ block @ residual[row, group]
    return errors


def test_groups_by_hand() -> None:
    x = torch.tensor([[7.0, -3.4, 0.7, 0.14]])
    scale = peak_scale(x, 4, group_size=2)
    assert torch.allclose(scale, torch.tensor([[1.0, 0.1]]))
    assert quantize(x, scale, 4).tolist() == [[7, -3, 7, 1]]


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_symmetric_and_clipped(bits: int) -> None:
    x = random(16, 32)
    codes = quantize(x, peak_scale(x, bits, 8) * 0.5, bits)
    assert codes.min() == -qmax(bits) and codes.max() == qmax(bits)


def test_largest_and_smallest_codes() -> None:
    assert [qmax(bits) for bits in BITS] == [1, 3, 7, 15, 31, 63, 127]
    assert [qmin(bits) for bits in BITS] == [-1, -3, -7, -15, -31, -63, -127]
    assert [qmin(bits, "full") for bits in BITS] == [-2, -4, -8, -16, -32, -64, -128]


@pytest.mark.parametrize("bits", BITS)
def test_full_codes_use_the_lowest_one_too(bits: int) -> None:
    x = random(16, 32)
    scale = peak_scale(x, bits, 8) * 0.5
    symmetric, full = quantize(x, scale, bits), quantize(x, scale, bits, "full")
    assert full.min() == -(2 ** (bits - 1)) and full.max() == qmax(bits)
    assert torch.equal(full.clamp(min=-qmax(bits)), symmetric)
    assert torch.equal(quantize(x, scale, bits, "symmetric"), symmetric)


def test_full_codes_leave_the_scale_alone() -> None:
    x = torch.tensor([[-8.0, 7.0]])
    assert quantize(x, torch.ones(1, 1), 4, "full").tolist() == [[-8, 7]]
    assert torch.equal(weight_scale(x, 4, codes="full"), weight_scale(x, 4))


@pytest.mark.parametrize("bits", BITS)
def test_error_is_at_most_half_a_step(bits: int) -> None:
    x = random(16, 32)
    scale = peak_scale(x, bits, 16)
    error = (dequantize(quantize(x, scale, bits), scale) - x).abs()
    assert (error <= scale.repeat_interleave(16, 1) * 0.5 * (1 + 1e-9)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("search", ["max", "mse", "mse_coarse", "output"])
def test_representable_values_survive_exactly(bits: int, search: ScaleSearch) -> None:
    limit = qmax(bits)
    codes = torch.randint(-limit, limit + 1, (8, 32), generator=torch.Generator().manual_seed(1))
    codes[:, ::16] = limit  # so that every group reaches its peak
    values = codes.double() * 2.0 ** torch.arange(-4, 4)[:, None]
    scale = weight_scale(values, bits, 16, search, torch.eye(32).double())
    assert torch.equal(quantize(values, scale, bits).long(), codes)
    assert torch.equal(dequantize(quantize(values, scale, bits), scale), values)


def test_groups_of_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 8)
    x[0, :4] = 1.0
    searches: list[ScaleSearch] = ["max", "mse", "mse_coarse", "output"]
    for search in searches:
        scale = weight_scale(x, 4, 4, search, torch.eye(8))
        assert scale[1].tolist() == [0, 0]
        codes = quantize(x, scale, 4)
        assert codes[1].count_nonzero() == 0
        assert dequantize(codes, scale).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
def test_search_is_never_worse_than_the_peak(bits: int, group_size: int | None) -> None:
    weight = random(32, 64, seed=bits) ** 3  # heavy tails

    def errors(search: str) -> torch.Tensor:
        scale = weight_scale(weight, bits, group_size, search)  # type: ignore[arg-type]
        residual = dequantize(quantize(weight, scale, bits), scale) - weight
        return residual.unflatten(1, (scale.shape[1], -1)).square().sum(-1)

    assert (errors("mse") <= errors("max")).all()
    assert bits == 8 or errors("mse").sum() < errors("max").sum()


@pytest.mark.parametrize("search", FRACTIONS)
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("codes", ["symmetric", "full"])
def test_search_is_brute_force_over_its_candidates(search: ScaleSearch, group_size: int | None, codes: Codes) -> None:
    weight = random(6, 24, seed=3) ** 3
    hessian = correlated_hessian(24, seed=4)
    weighing = hessian if search == "output" else None
    peak = peak_scale(weight, 4, group_size)
    candidates = torch.stack([storable(peak * fraction) for fraction in FRACTIONS[search]])
    errors = torch.stack([errors_of(weight, scale, weighing, codes) for scale in candidates])
    expected = candidates.gather(0, errors.argmin(0, keepdim=True))[0]
    assert torch.equal(weight_scale(weight, 4, group_size, search, hessian, codes), expected)


@pytest.mark.parametrize("search", ["mse", "mse_coarse"])
@pytest.mark.parametrize("columns_first", [False, True])
def test_many_rows_have_the_scales_that_they_have_alone(search: ScaleSearch, columns_first: bool) -> None:
    weight = random(700, 128, seed=5) ** 3  # more than are searched at a time
    if columns_first:  # as GPTQ has them
        weight = weight.t().contiguous().t()
    alone = torch.cat([weight_scale(rows, 4, 32, search) for rows in weight.split(64)])
    assert torch.equal(weight_scale(weight, 4, 32, search), alone)


@pytest.mark.parametrize("search", FRACTIONS)
def test_every_fraction_that_is_not_coarser_than_the_peak_can_win(search: ScaleSearch) -> None:
    """A group of multiples of that fraction of the peak's scale, but for its peak."""
    codes = torch.randint(-5, 6, (1, 1024), generator=torch.Generator().manual_seed(0)).double()
    for fraction in (f for f in FRACTIONS[search] if f < 2):
        weight = codes * storable(torch.tensor(fraction, dtype=torch.float64))
        weight[0, 0] = 7.0
        scale = weight_scale(weight, 4, None, search, torch.eye(1024).double())
        assert scale == storable(torch.tensor(fraction, dtype=torch.float64)), fraction


@pytest.mark.parametrize("group_size", [None, 8])
def test_output_search_is_never_worse_for_the_output_of_a_group(group_size: int | None) -> None:
    weight = random(16, 32, seed=1) ** 3
    hessian = correlated_hessian(32, seed=2)
    found = errors_of(weight, weight_scale(weight, 4, group_size, "output", hessian), hessian, "symmetric")
    peak = errors_of(weight, weight_scale(weight, 4, group_size), hessian, "symmetric")
    assert (found <= peak).all() and found.sum() < peak.sum()


def test_groups_that_never_carried_anything_keep_their_peak() -> None:
    weight, hessian = random(4, 16) ** 3, correlated_hessian(16, seed=1)
    hessian[:8] = hessian[:, :8] = 0
    assert torch.equal(weight_scale(weight, 4, 8, "output", hessian)[:, 0], weight_scale(weight, 4, 8)[:, 0])


def test_output_error_is_the_squared_error_of_the_outputs() -> None:
    x, residual = random(50, 12, seed=1), random(5, 12, seed=2)
    assert torch.allclose(output_error(residual, x.t() @ x), (x @ residual.t()).square().sum(0))


def test_output_search_needs_a_finite_hessian() -> None:
    with pytest.raises(ValueError, match="pass `hessian`"):
        weight_scale(torch.ones(2, 8), 4, 4, "output")
    hessian = torch.eye(8)
    hessian[2, 3] = torch.nan
    with pytest.raises(ValueError, match="the Hessian is not finite"):
        weight_scale(torch.ones(2, 8), 4, 4, "output", hessian)
    check_finite(torch.eye(8))


def test_searches_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="no scale search 'learned'; there are max, mse, mse_coarse, output"):
        weight_scale(torch.ones(2, 8), 4, 4, "learned")  # type: ignore[arg-type]


@pytest.mark.parametrize("search", ["max", "mse", "mse_coarse", "output"])
def test_weight_scales_can_be_stored(search: ScaleSearch) -> None:
    scale = weight_scale(random(16, 32), 4, 8, search, correlated_hessian(32, seed=1))
    assert scale.dtype == torch.float64
    assert torch.equal(scale, scale.to(SCALE_DTYPE).double())
    assert torch.equal(storable(scale), scale)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 7 channels do not divide an input of 16"):
        weight_scale(torch.ones(2, 16), 4, 7)


def test_percentiles_by_hand() -> None:
    """The nearest rank: 99 % of 200 tokens are at most the 198th smallest."""
    values = torch.arange(1.0, 201)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    x = torch.stack([values, -2 * values], 1)
    assert percentile(x, 99.0).tolist() == [198, 396]
    assert percentile(torch.arange(1.0, 2001.0)[:, None], 99.9).tolist() == [1998]  # 99.9 is no binary fraction
    assert percentile(x, 99.2).tolist() == [199, 398]
    assert percentile(x, 100.0).tolist() == [200, 400]
    assert percentile(x, 0.0).tolist() == [1, 2]
    assert percentile(x[:1], 50.0).tolist() == x[0].abs().tolist()
