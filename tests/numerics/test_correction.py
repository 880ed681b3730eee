"""The corrections of QuantVLA §3.3: what they restore, and what they leave alone."""

import math

import pytest
import torch
from torch import Tensor

from omega_qvla.numerics.correction import centred_logit_power, ratio

BATCH, HEADS, QUERIES, KEYS = 2, 3, 5, 7
OPEN = {"limit": 10.0, "dead_band": 0.0}


def logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, HEADS, QUERIES, KEYS, generator=generator, dtype=torch.float64)


def deviation(weights: Tensor) -> Tensor:
    power, count = centred_logit_power(weights)
    return (power / count).sqrt()


def test_the_spread_scales_with_the_logits() -> None:
    for alpha in (0.1, 0.8, 1.25, 20.0):
        expected = alpha * deviation(logits().softmax(-1))
        assert torch.allclose(deviation((alpha * logits()).softmax(-1)), expected, rtol=1e-12)


def test_the_spread_is_that_of_the_logits_within_rows() -> None:
    rows = logits()
    expected = rows.var(-1, correction=0).mean((0, 2)).sqrt()
    assert torch.allclose(deviation(rows.softmax(-1)), expected, rtol=1e-12)


def test_a_constant_per_row_changes_nothing() -> None:
    shifted = logits() + 5 * logits(seed=1)[..., :1]
    assert torch.allclose(deviation(shifted.softmax(-1)), deviation(logits().softmax(-1)), rtol=1e-12)


def test_masked_keys_do_not_count() -> None:
    rows, mask = logits(), torch.arange(KEYS) >= 4
    power, count = centred_logit_power(rows.masked_fill(mask, -torch.inf).softmax(-1))
    alone, alone_count = centred_logit_power(rows[..., ~mask].softmax(-1))
    assert torch.allclose(power, alone, rtol=1e-12)
    assert count.tolist() == alone_count.tolist() == [BATCH * QUERIES * 4] * HEADS


def test_a_small_weight_is_not_masked() -> None:
    rows = torch.tensor([0.0, -60.0]).expand(1, 1, 1, 2)
    power, count = centred_logit_power(rows.softmax(-1))
    assert count.tolist() == [2] and power.tolist() == pytest.approx([2 * 30.0**2])


def test_a_row_of_one_key_has_no_spread() -> None:
    power, count = centred_logit_power(torch.ones(BATCH, HEADS, QUERIES, 1))
    assert power.tolist() == [0] * HEADS and count.tolist() == [BATCH * QUERIES] * HEADS


def test_a_row_without_keys_does_not_count() -> None:
    weights = logits().softmax(-1)
    power, count = centred_logit_power(weights)
    weights = torch.cat([weights, torch.zeros(BATCH, HEADS, 1, KEYS)], dim=2)
    longer, longer_count = centred_logit_power(weights)
    assert torch.equal(longer, power) and torch.equal(longer_count, count)


def test_the_ratio_restores_the_teacher() -> None:
    teacher, student = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.8, 2.5, 0.5])
    assert torch.allclose(ratio(teacher, student, **OPEN) * student, teacher.double(), rtol=1e-5)


def test_the_ratio_as_printed() -> None:
    """Eq. 9 adds 1e-6 to the student."""
    factor = ratio(torch.tensor(1e-3), torch.tensor(1e-3), **OPEN)
    assert factor.item() == pytest.approx(1 / 1.001, rel=1e-6)


@pytest.mark.parametrize(("student", "expected"), [(0.5, math.exp(0.3)), (2.0, math.exp(-0.3))])
def test_the_ratio_is_clipped(student: float, expected: float) -> None:
    factor = ratio(torch.tensor(1.0), torch.tensor(student), limit=0.3, dead_band=0.03)
    assert factor.item() == pytest.approx(expected, rel=1e-12)


def test_what_the_student_alone_has_is_taken_back_to_the_limit() -> None:
    assert ratio(torch.tensor(0.0), torch.tensor(1.0), limit=0.3, dead_band=0.03).log().item() == pytest.approx(-0.3)


def test_the_dead_band() -> None:
    student = torch.tensor([0.975, 1.0, 1.025, 0.965, 1.035])
    factor = ratio(torch.ones(5), student, limit=0.3, dead_band=0.03)
    assert factor[:3].tolist() == [1, 1, 1]
    assert factor[3] > math.exp(0.03) and factor[4] < math.exp(-0.03)


def test_where_neither_has_the_statistic_the_factor_is_one() -> None:
    factor = ratio(torch.tensor([0.0, 1e-16]), torch.tensor([1e-16, 0.0]), limit=0.3, dead_band=0.03)
    assert factor.tolist() == [1, 1]


def test_what_quantization_has_reduced_to_zero() -> None:
    with pytest.raises(ValueError, match="no factor restores it"):
        ratio(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]), limit=0.3, dead_band=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_statistic_that_is_not_finite(bad: float) -> None:
    for teacher, student in ((bad, 1.0), (1.0, bad)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            ratio(torch.tensor(teacher), torch.tensor(student), limit=0.3, dead_band=0.03)
