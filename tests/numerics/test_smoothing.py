import pytest
import torch

from omega_qvla.numerics.smoothing import smoothing_factor


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0])
def test_formula(alpha: float) -> None:
    peak = torch.tensor([1.0, 4.0, 9.0])
    weight = torch.tensor([[0.5, -2.0, 0.1], [-0.25, 1.0, -0.4]])
    expected = [x**alpha / w ** (1 - alpha) for x, w in zip([1, 4, 9], [0.5, 2.0, 0.4], strict=True)]
    assert torch.allclose(smoothing_factor(peak, weight, alpha), torch.tensor(expected))


def test_half_makes_both_peaks_equal() -> None:
    peak, weight = torch.rand(16) + 0.1, torch.randn(32, 16)
    factor = smoothing_factor(peak, weight, 0.5)
    assert torch.allclose(peak / factor, (weight * factor).abs().amax(0))


def test_dead_channels_keep_one() -> None:
    factor = smoothing_factor(torch.tensor([0.0, 2.0, 0.0, 4.0]), torch.tensor([[1.0, 0.0, 0.0, 1.0]]), 0.5)
    assert factor.tolist() == [1, 1, 1, 2]


def test_factors_are_clipped() -> None:
    factor = smoothing_factor(torch.tensor([1e12, 1e-12]), torch.ones(1, 2), 0.5)
    assert factor.tolist() == pytest.approx([1e3, 1e-3])
