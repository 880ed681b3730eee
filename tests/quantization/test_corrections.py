"""Attention temperature matching and output head balancing: planted drifts are found and undone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.calibration.statistics import CalibrationError
from omega_qvla.numerics.quantizer import SCALE_DTYPE, quantize, weight_scale
from omega_qvla.pack.bits import pack
from omega_qvla.pack.rows import pack_rows
from omega_qvla.pack.site import PackedLinear, PackedSite
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import Attention, Observation
from omega_qvla.quantization.corrections import Corrections, apply_corrections, fit_corrections
from omega_qvla.runtime import DenoisingStep, QuantizedLinear, quantized_linears
from omega_qvla.spec import ActivationSpec, AllocationSpec, CorrectionSpec, LinearSpec, Part, RecipeError, WeightSpec
from toy_policy import ToyPolicy, toy_observations

EXACT = LinearSpec(weight=WeightSpec(allocation=AllocationSpec(average_bits=16)), activation=ActivationSpec(bits=16))
EIGHT = LinearSpec(weight=WeightSpec(bits=8), activation=ActivationSpec(bits=8))
OPEN = CorrectionSpec(part="language", limit=10.0, dead_band=1e-4)
HEAD_DIM = 16
SCALE_ERROR = 2**-8
"""Of a factor that is rounded to bfloat16."""


def packed_linear(name: str, weight: Tensor, spec: LinearSpec, drift: Tensor | float = 1.0) -> PackedLinear:
    """A weight [out, in] with its rows multiplied by `drift`; in EXACT it loses nothing, as it is bfloat16."""
    if spec.weight.mixed:
        scale, widths = torch.ones(len(weight), 1), torch.full((len(weight),), 16, dtype=torch.uint8)
        codes, tensors = pack_rows({16: weight}), {"widths": widths}
    else:
        scale = weight_scale(weight, spec.weight.bits)
        codes, tensors = pack(quantize(weight, scale, spec.weight.bits), spec.weight.bits), {}
    drifted = scale * torch.as_tensor(drift).expand(len(weight)).unsqueeze(1)
    return PackedLinear(name, codes, drifted.to(SCALE_DTYPE), None, tensors)


def planted(policy: PI05, name: str, drift: Tensor | float = 1.0, spec: LinearSpec = EXACT) -> PackedSite:
    """One quantized linear, as a site of its own."""
    weight = policy.module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    linear = packed_linear(name, weight.detach(), spec, drift)
    return PackedSite(f"{name}.input", "language", weight.shape[1], spec, (linear,))


def attention_of(policy: PI05, part: Part = "language") -> Attention:
    """The last of its part: what is planted there reaches no other."""
    return [attention for attention in policy.attentions() if attention.part == part][-1]


def per_head(attention: Attention, *drifts: float) -> tuple[Tensor, Tensor]:
    """Drifts for the heads, the last one for all that remain, and the same for every row of queries."""
    heads = torch.tensor([*drifts, *drifts[-1:] * (attention.heads - len(drifts))], dtype=torch.float64)
    return heads, heads.repeat_interleave(HEAD_DIM)


@pytest.fixture
def few(observations: Observation) -> Observation:
    return observations[:2]


@pytest.mark.parametrize(("spec", "tolerance"), [(EXACT, SCALE_ERROR), (EIGHT, 0.02)])
def test_a_planted_temperature_is_restored(
    floating: PI05, few: Observation, spec: LinearSpec, tolerance: float
) -> None:
    attention = attention_of(floating)
    heads, rows = per_head(attention, 0.8, 1.25, 0.9, 0.8)
    sites = [planted(floating, attention.query, rows, spec)]
    fit = replace(OPEN, balance=False)
    found = fit_corrections(floating, sites, fit, few)
    assert torch.allclose(found.temperature[attention.query], 1 / heads, rtol=tolerance)
    corrected, changed = apply_corrections(found, sites, floating)
    assert not changed
    again = fit_corrections(floating, corrected, fit, few)
    for factor in again.temperature.values():
        assert torch.allclose(factor, torch.ones_like(factor), rtol=tolerance)


def test_the_temperature_of_the_action_head(floating: PI05, few: Observation) -> None:
    attention = attention_of(floating, "action")
    heads, rows = per_head(attention, 0.8, 1.25, 0.9)
    sites = [planted(floating, attention.query, rows)]
    found = fit_corrections(floating, sites, replace(OPEN, part="action", balance=False), few)
    # The drift moves the actions too, on which the next step's logits depend.
    assert torch.allclose(found.temperature[attention.query], 1 / heads, rtol=0.02)


@pytest.mark.parametrize(("spec", "tolerance"), [(EXACT, SCALE_ERROR), (EIGHT, 0.02)])
def test_a_planted_energy_is_restored(floating: PI05, few: Observation, spec: LinearSpec, tolerance: float) -> None:
    attention = attention_of(floating)
    sites = [planted(floating, attention.output, 0.8, spec)]
    fit = replace(OPEN, temperature=False)
    found = fit_corrections(floating, sites, fit, few)
    assert found.balance[attention.output] == pytest.approx(1.25, rel=tolerance)
    corrected, changed = apply_corrections(found, sites, floating)
    assert not changed
    again = fit_corrections(floating, corrected, fit, few)
    assert again.balance[attention.output] == pytest.approx(1, rel=tolerance)


def test_the_energy_is_measured_with_the_temperature_in_place(floating: PI05, few: Observation) -> None:
    attention = attention_of(floating)
    sites = [planted(floating, attention.query, 0.5)]
    cold = fit_corrections(floating, sites, replace(OPEN, temperature=False), few)
    both = fit_corrections(floating, sites, OPEN, few)
    assert abs(math.log(cold.balance[attention.output])) > 0.02
    assert abs(math.log(both.balance[attention.output])) < 0.1 * abs(math.log(cold.balance[attention.output]))


def test_queries_kept_in_floating_point_are_corrected_in_their_weights(floating: PI05, few: Observation) -> None:
    attention = attention_of(floating)
    sites = [planted(floating, attention.query.replace("q_proj", "k_proj"), 0.8)]
    spec = replace(OPEN, dead_band=0.03)
    found = fit_corrections(floating, sites, spec, few)
    corrected, changed = apply_corrections(found, sites, floating)
    assert corrected == sites
    assert set(changed) == {f"{attention.query}.weight"}
    stored, weight = floating.stored_tensors().read(f"{attention.query}.weight"), changed[f"{attention.query}.weight"]
    assert weight.dtype == stored.dtype == torch.bfloat16
    assert torch.allclose(weight.double(), 1.25 * stored.double(), rtol=2 * SCALE_ERROR)
    # β is measured with those weights in place, so it finds nothing left to do.
    assert set(found.balance.values()) == {1.0}


@pytest.mark.parametrize(("drift", "expected"), [(0.5, math.exp(0.3)), (2.0, math.exp(-0.3))])
def test_factors_are_clipped(floating: PI05, few: Observation, drift: float, expected: float) -> None:
    attention = attention_of(floating)
    sites = [planted(floating, attention.query, drift), planted(floating, attention.output, drift)]
    found = fit_corrections(floating, sites, CorrectionSpec(part="language"), few)
    assert found.temperature[attention.query].tolist() == pytest.approx([expected] * attention.heads)
    assert found.balance[attention.output] == pytest.approx(expected)


def test_inside_the_dead_band_nothing_changes(floating: PI05, few: Observation) -> None:
    attention = attention_of(floating)
    sites = [planted(floating, attention.query, 0.98), planted(floating, attention.output, 1.02)]
    found = fit_corrections(floating, sites, CorrectionSpec(part="language"), few)
    assert found.factors() == {}
    assert apply_corrections(found, sites, floating) == (sites, {})


def test_heads_inside_the_dead_band_keep_their_scales(floating: PI05) -> None:
    attention = attention_of(floating)
    site = planted(floating, attention.query, spec=EIGHT)
    heads, _ = per_head(attention, 1.0, 1.3, 1.0)
    (corrected,), _ = apply_corrections(Corrections({attention.query: heads}), [site], floating)
    before, after = site.linears[0], corrected.linears[0]
    moved = (after.scale != before.scale).any(1)
    assert moved.nonzero().flatten().tolist() == list(range(HEAD_DIM, 2 * HEAD_DIM))
    assert torch.equal(after.packed, before.packed)


def test_what_is_not_asked_for_is_not_fitted(floating: PI05, few: Observation) -> None:
    found = fit_corrections(floating, [], replace(OPEN, temperature=False, balance=False), few)
    assert found == Corrections()


def test_a_student_that_is_the_teacher(floating: PI05, few: Observation) -> None:
    found = fit_corrections(floating, [], CorrectionSpec(part="action"), few)
    assert len(found.temperature) == len(found.balance) == 2
    assert found.factors() == {}


def test_the_policy_is_left_as_it_was(floating: PI05, few: Observation) -> None:
    attention = attention_of(floating)
    before = {name: tensor.clone() for name, tensor in floating.module.state_dict().items()}
    sites = [planted(floating, attention.query.replace("q_proj", "k_proj"), 0.8)]
    fit_corrections(floating, sites, OPEN, few)
    linear = sites[0].linears[0]
    broken = replace(sites[0], linears=(replace(linear, scale=torch.full_like(linear.scale, torch.nan)),))
    with pytest.raises(ValueError):
        fit_corrections(floating, [broken], OPEN, few)
    after = floating.module.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(isinstance(module, QuantizedLinear) for module in floating.module.modules())
    assert not any(module._forward_hooks for module in floating.module.modules())


def test_quantization_that_leaves_nothing(floating: PI05, few: Observation) -> None:
    attention = attention_of(floating)
    _, rows = per_head(attention, 1.0, 0.0, 1.0)
    with pytest.raises(CalibrationError, match=rf"logits of {attention.name}: .* no factor restores it"):
        fit_corrections(floating, [planted(floating, attention.query, rows)], OPEN, few)
    with pytest.raises(CalibrationError, match=rf"output of {attention.name}: .* no factor restores it"):
        fit_corrections(floating, [planted(floating, attention.output, 0.0)], OPEN, few)


def test_a_part_without_attention() -> None:
    with pytest.raises(RecipeError, match=r"corrections\.part = 'language'"):
        fit_corrections(ToyPolicy(), [], CorrectionSpec(part="language"), toy_observations(4))


def test_an_attention_without_weights(floating: PI05, few: Observation) -> None:
    attention = attention_of(floating)
    module = floating.module.get_submodule(attention.name)
    handle = module.register_forward_hook(lambda module, inputs, result: (result[0], None))
    try:
        with pytest.raises(CalibrationError, match=f"{attention.name} returns no attention weights"):
            fit_corrections(floating, [], OPEN, few)
    finally:
        handle.remove()


def test_an_attention_that_never_ran(floating: PI05, few: Observation) -> None:
    with pytest.raises(CalibrationError, match="never ran"):
        fit_corrections(floating, [], OPEN, few[:0])


def test_a_linear_that_does_not_exist(floating: PI05) -> None:
    with pytest.raises(KeyError, match=r"nowhere\.weight"):
        apply_corrections(Corrections(balance={"nowhere": 1.2}), [], floating)


@pytest.mark.parametrize("form", ["codes", "rows of 16 bits", "low rank", "output rotation", "both"])
def test_outputs_are_multiplied_whatever_the_form(floating: PI05, form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(32, 16, generator=generator).bfloat16().float(), torch.randn(32, generator=generator)
    spec = EXACT if form == "rows of 16 bits" else EIGHT
    linear = packed_linear("linear", weight, spec)
    tensors = dict(linear.tensors)
    if form in ("low rank", "both"):
        tensors |= {"low_rank_up": torch.randn(32, 2, generator=generator).bfloat16()}
        tensors |= {"low_rank_down": torch.randn(2, 16, generator=generator).bfloat16()}
    if form in ("output rotation", "both"):
        tensors |= {"output_rotation": torch.randn(4, 8, 8, generator=generator).bfloat16()}
    site = PackedSite("site", "action", 16, spec, (replace(linear, bias=bias, tensors=tensors),))
    factor = torch.tensor([0.75, 1.0, 1.3, 1.1], dtype=torch.float64)
    (corrected,), _ = apply_corrections(Corrections({"linear": factor}), [site], floating)
    x = torch.randn(5, 16, generator=generator)
    before, after = (output_of(each, x) for each in (site, corrected))
    expected = before * factor.repeat_interleave(8)
    assert (after - expected).norm() < SCALE_ERROR * expected.norm()
    assert torch.equal(after[:, 8:16], before[:, 8:16])


def output_of(site: PackedSite, x: Tensor) -> Tensor:
    linear: nn.Module = quantized_linears(site, DenoisingStep(1), "simulated")[0]
    return linear(x)
