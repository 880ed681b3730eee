"""The loops of quantization: the same bits on every processor, and what the plain torch code gives."""

import pytest
import torch
from torch import Tensor

from omega_qvla.kernels.native import available, round_columns, search_scale
from omega_qvla.numerics import gptq as solver
from omega_qvla.numerics import quantizer

if not available():
    pytest.skip("installed without compiled kernels", allow_module_level=True)

FRACTIONS = [1 - i / 100 for i in range(51)]
FLOATS = [torch.float32, torch.float64]


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def squared_errors(x: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0)
    codes = (x * inverse[:, None]).round().clamp(lowest, highest)
    return (codes * scale[:, None] - x).double().square().sum(1)


@pytest.mark.parametrize("kernels", available())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("groups", "size"), [(1, 1), (7, 5), (33, 16), (64, 64), (5, 67), (3, 500), (0, 8)])
@pytest.mark.parametrize(("lowest", "highest"), [(-7, 7), (-8, 7), (-1, 1), (-127, 127)])
def test_a_searched_scale_leaves_the_smallest_error(
    kernels: str, dtype: torch.dtype, groups: int, size: int, lowest: int, highest: int
) -> None:
    x = random(groups, size, dtype=dtype, seed=groups * size) ** 3
    x[::4] = 0
    peak = x.abs().amax(1) / highest
    scale = search_scale(x, peak, FRACTIONS, lowest, highest, kernels=kernels)
    tried = torch.stack([quantizer.storable(peak * fraction) for fraction in FRACTIONS])
    assert (tried == scale).any(0).all()
    errors = torch.stack([squared_errors(x, candidate, lowest, highest) for candidate in tried])
    assert torch.allclose(squared_errors(x, scale, lowest, highest), errors.amin(0), rtol=1e-5, atol=0)
    assert torch.equal(scale, search_scale(x, peak, FRACTIONS, lowest, highest, kernels="portable"))


@pytest.mark.parametrize("kernels", available())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("columns", "outputs"), [(1, 1), (5, 3), (64, 16), (67, 33), (128, 100), (0, 4), (4, 0)])
def test_columns_are_rounded_as_torch_rounds_them(
    kernels: str, dtype: torch.dtype, columns: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random(columns, outputs, dtype=dtype, seed=1)
    owed = random(columns, outputs + 7, dtype=dtype, seed=2)[:, :outputs]
    factor = (random(columns, columns + 3, dtype=dtype, seed=3)[:, :columns] * 0.1 + 2 * torch.eye(columns)).to(dtype)
    scale = random(outputs, dtype=dtype, seed=4).abs() / 4
    scale[::5] = 0
    before = owed.clone()
    codes, errors = round_columns(weight, owed, factor, scale, -8, 7, kernels=kernels)
    assert torch.equal(owed, before)
    monkeypatch.setattr(solver.native, "available", tuple)
    expected_codes, expected_errors = solver._round_columns(weight, owed, factor, scale, -8, 7)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(errors, expected_errors)


@pytest.mark.parametrize("group_size", [None, 64, 48])
def test_without_a_compiler_the_error_is_the_same(group_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are searched with sums in another order: another of two equally good ones may win."""
    x = random(400, 192, dtype=torch.float64, seed=0) @ random(192, 192, dtype=torch.float64, seed=1)
    weight, hessian = random(32, 192, dtype=torch.float64, seed=2), x.t() @ x

    def output_error() -> float:
        codes, scale = solver.gptq(weight, hessian, bits=4, group_size=group_size, search="mse")
        return float((x @ (quantizer.dequantize(codes, scale) - weight).t()).square().sum())

    compiled = output_error()
    monkeypatch.setattr(solver.native, "available", tuple)
    assert output_error() == pytest.approx(compiled, rel=1e-3)


def test_wrong_arguments_are_named() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"x is torch\.int8, neither float32 nor float64"):
        search_scale(x.to(torch.int8), torch.ones(2), FRACTIONS, -7, 7)
    with pytest.raises(ValueError, match="peak"):
        search_scale(x, torch.ones(3), FRACTIONS, -7, 7)
    with pytest.raises(ValueError, match="factor"):
        round_columns(x, x, torch.ones(3, 3), torch.ones(4), -7, 7)
    with pytest.raises(ValueError, match="owed"):
        round_columns(x, x.double(), torch.ones(2, 2), torch.ones(4), -7, 7)
    with pytest.raises(ValueError, match="runs no kernels called 'mmx'"):
        search_scale(x, torch.ones(2), FRACTIONS, -7, 7, kernels="mmx")
