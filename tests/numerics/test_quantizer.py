"""The uniform quantizer against its definition (Ω-QVLA Eq. 8-9)."""

import pytest
import torch

from omega_qvla.numerics.quantizer import (
    SCALE_DTYPE,
    dequantize,
    peak_scale,
    percentile,
    qmax,
    quantize,
    storable,
    weight_scale,
)

BITS = range(2, 9)


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


def test_largest_codes() -> None:
    assert [qmax(bits) for bits in BITS] == [1, 3, 7, 15, 31, 63, 127]


@pytest.mark.parametrize("bits", BITS)
def test_error_is_at_most_half_a_step(bits: int) -> None:
    x = random(16, 32)
    scale = peak_scale(x, bits, 16)
    error = (dequantize(quantize(x, scale, bits), scale) - x).abs()
    assert (error <= scale.repeat_interleave(16, 1) * 0.5 * (1 + 1e-9)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("search", ["max", "mse"])
def test_representable_values_survive_exactly(bits: int, search: str) -> None:
    limit = qmax(bits)
    codes = torch.randint(-limit, limit + 1, (8, 32), generator=torch.Generator().manual_seed(1))
    codes[:, ::16] = limit  # so that every group reaches its peak
    values = codes.double() * 2.0 ** torch.arange(-4, 4)[:, None]
    scale = weight_scale(values, bits, 16, search)  # type: ignore[arg-type]
    assert torch.equal(quantize(values, scale, bits).long(), codes)
    assert torch.equal(dequantize(quantize(values, scale, bits), scale), values)


def test_groups_of_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 8)
    x[0, :4] = 1.0
    for search in ("max", "mse"):
        scale = weight_scale(x, 4, 4, search)
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


@pytest.mark.parametrize("search", ["max", "mse"])
def test_weight_scales_can_be_stored(search: str) -> None:
    scale = weight_scale(random(16, 32), 4, 8, search)  # type: ignore[arg-type]
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
    assert percentile(x, 99.2).tolist() == [199, 398]
    assert percentile(x, 100.0).tolist() == [200, 400]
    assert percentile(x, 0.0).tolist() == [1, 2]
    assert percentile(x[:1], 50.0).tolist() == x[0].abs().tolist()
