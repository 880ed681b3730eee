"""What quantization makes of a policy, against the formulas put together by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toy_policy
from omega_qvla.calibration import CalibrationError, Needs, collect
from omega_qvla.numerics.gptq import gptq
from omega_qvla.numerics.quantizer import dequantize, percentile, quantize, weight_scale
from omega_qvla.numerics.smoothing import smoothing_factor
from omega_qvla.pack.bits import unpack
from omega_qvla.pack.site import PackedSite, tensors_of
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import Observation
from omega_qvla.quantization import Quantized, quantize_policy
from omega_qvla.quantization.driver import Room
from omega_qvla.quantization.site import Found, quantize_site
from omega_qvla.runtime import installed
from omega_qvla.runtime.input import site_transform
from omega_qvla.spec import Recipe, read_recipe, with_scope
from toy_policy import ToyPolicy, recipe, rules_for_both, toy_observations

FULL: dict[str, Any] = {
    "transform": {
        "smoothing": 0.5,
        "permutation": "zigzag",
        "rotation": "svd_hadamard",
        "block_size": 8,
        "folded_percentile": 99.0,
    },
    "weight": {"group_size": 8, "scale_search": "mse", "rounding": "gptq"},
    "activation": {"granularity": "token_group", "group_size": 8},
}


def run(recipe: Recipe, policy: ToyPolicy | None = None, **options: Any) -> dict[str, PackedSite]:
    result = quantize_policy(policy or ToyPolicy(), recipe, toy_observations(20), **options)
    return {site.name: site for site in result.sites}


def weights_of(policy: ToyPolicy, site: PackedSite) -> dict[str, Tensor]:
    return {linear.name: policy.module.state_dict()[f"{linear.name}.weight"] for linear in site.linears}


def codes_and_scales(site: PackedSite) -> dict[str, tuple[Tensor, Tensor]]:
    return {linear.name: (unpack(linear.packed, site.spec.weight.bits), linear.scale) for linear in site.linears}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("search", ["max", "mse"])
def test_rounding_to_nearest(bits: int, search: Any) -> None:
    policy = ToyPolicy()
    sites = run(rules_for_both({"weight": {"bits": bits, "group_size": 8, "scale_search": search}}), policy)
    for site in sites.values():
        assert not site.tensors
        for name, weight in weights_of(policy, site).items():
            codes, scale = codes_and_scales(site)[name]
            expected = weight_scale(weight.double(), bits, 8, search)
            assert scale.dtype == torch.bfloat16 and torch.equal(scale.double(), expected)
            assert torch.equal(codes, quantize(weight.double(), expected, bits))


def test_the_full_composition() -> None:
    policy = ToyPolicy()
    needs = {site: Needs(hessian=True, samples=True) for site in policy.sites()}
    gathered = collect(policy, needs, toy_observations(20), noise_seed=0)
    for site in run(rules_for_both(FULL), policy).values():
        statistics, transform = gathered[site.name], site_transform(site)
        weights = weights_of(policy, site)
        stacked = torch.cat(list(weights.values())).double()
        assert statistics.peak is not None and transform.smoothing is not None
        assert torch.equal(transform.smoothing, smoothing_factor(statistics.peak, stacked, 0.5))
        assert statistics.hessian is not None
        hessian = transform.hessian(statistics.hessian.double())
        for name, (codes, scale) in codes_and_scales(site).items():
            expected, expected_scale = gptq(
                transform.fold(weights[name]), hessian, bits=4, group_size=8, search="mse"
            )
            assert torch.equal(codes, expected)
            assert torch.equal(scale.double(), expected_scale)


def test_a_folded_factor_makes_channels_alike() -> None:
    policy = ToyPolicy()
    site = run(rules_for_both(FULL), policy)["action.hidden"]
    tokens = collect(policy, {s: Needs(samples=True) for s in policy.sites()}, toy_observations(20), noise_seed=0)[
        "action.hidden"
    ]
    transformed = site_transform(site).apply(torch.cat(list(tokens.samples.values())))
    reached = percentile(transformed, 99.0)
    assert torch.allclose(reached, torch.ones_like(reached), rtol=1e-5)


@pytest.mark.parametrize(
    ("granularity", "mode", "shape"),
    [
        ("channel", "per_step", (4, 16)),
        ("channel", "static", (1, 16)),
        ("tensor", "per_step", (4, 1)),
        ("tensor", "static", (1, 1)),
    ],
)
def test_calibrated_scales(granularity: str, mode: str, shape: tuple[int, int]) -> None:
    """The percentile of |X'|, divided by the largest code (Ω-QVLA Eq. 10)."""
    policy = ToyPolicy()
    activation = {"granularity": granularity, "mode": mode, "percentile": 90.0}
    kept = {"part": "language", "keep": "no steps"}
    site = run(recipe(kept, {"part": "action", "quantize": {"activation": activation}}), policy)["action.input"]
    needs = {s: Needs(samples=True) for s in policy.sites()}
    samples = collect(policy, needs, toy_observations(20), noise_seed=0)["action.input"].samples
    rows = [samples[step] for step in range(4)] if mode == "per_step" else [torch.cat(list(samples.values()))]
    if granularity == "tensor":
        rows = [row.reshape(-1, 1) for row in rows]
    expected = torch.stack([percentile(row, 90.0) / 7 for row in rows])
    scale = site.tensors["step_scale"]
    assert scale.shape == shape and scale.dtype == torch.float32
    assert torch.allclose(scale, expected)


def test_biases_are_taken_as_they_are() -> None:
    policy = ToyPolicy()
    for site in run(rules_for_both({}), policy).values():
        for linear in site.linears:
            assert linear.bias is not None
            assert torch.equal(linear.bias, policy.module.state_dict()[f"{linear.name}.bias"])


def test_a_transform_per_linear() -> None:
    table = {"transform": {"rotation": "svd", "block_size": 16, "sharing": "linear"}}
    sites = run(rules_for_both(table))
    assert set(sites) == {"language.q.input", "language.k.input", "action.up.input", "action.down.input"}
    q, k = sites["language.q.input"].tensors["rotation"], sites["language.k.input"].tensors["rotation"]
    assert not torch.equal(q, k)


def test_rules_that_split_a_site_give_each_part_its_own_transform() -> None:
    tables = [
        {"transform": {"rotation": "svd", "block_size": size}, "weight": {"rounding": "gptq"}} for size in (8, 16)
    ]
    result = quantize_policy(
        ToyPolicy(),
        recipe(
            {"part": "language", "match": "q$", "quantize": tables[0]},
            {"part": "language", "quantize": tables[1]},
            {"part": "action", "keep": "not of interest"},
        ),
        toy_observations(8),
    )
    assert len({site.name for site in result.sites}) == 2
    assert [site.tensors["rotation"].shape[-1] for site in result.sites] == [8, 16]


def test_the_memory_budget_changes_nothing() -> None:
    def tensors(result: dict[str, PackedSite]) -> list[Tensor]:
        return [x for s in result.values() for x in (*s.tensors.values(), *(c.packed for c in s.linears))]

    at_once, one_by_one = run(rules_for_both(FULL)), run(rules_for_both(FULL), room=Room(statistics=0))
    assert list(at_once) == list(one_by_one)
    assert all(torch.equal(a, b) for a, b in zip(tensors(at_once), tensors(one_by_one), strict=True))


def assert_same(ours: dict[str, PackedSite], theirs: dict[str, PackedSite]) -> None:
    assert list(ours) == list(theirs)
    for name, site in ours.items():
        assert tensors_of([site]).keys() == tensors_of([theirs[name]]).keys()
        for key, tensor in tensors_of([site]).items():
            assert torch.equal(tensor, tensors_of([theirs[name]])[key])


@pytest.mark.parametrize("statistics", [0, 2**30])
def test_lockstep_changes_nothing(floating: PI05, observations: Observation, statistics: int, tmp_path: Path) -> None:
    """With a vision tower, statistics of one block or of all, and activations on disk."""
    chosen = with_scope(read_recipe("omega-int4"), "with-vision")
    rooms = Room(), Room(statistics=statistics, lockstep=True, activations=0, scratch=tmp_path)
    plain, in_lockstep = (
        {site.name: site for site in quantize_policy(floating, chosen, observations, room=room).sites}
        for room in rooms
    )
    assert {site.part for site in plain.values()} == {"vision", "language", "action"}
    assert_same(in_lockstep, plain)


def test_calibration_on_quantized_inputs(floating: PI05, observations: Observation) -> None:
    """Every language site is calibrated on what the sites before it, as they are quantized, make of the observations;
    the action part on what the quantized language model gives it."""
    chosen = replace(read_recipe("omega-int4"), calibration_inputs="quantized")
    before = {name: tensor.clone() for name, tensor in floating.module.state_dict().items()}
    result = quantize_policy(floating, chosen, observations)
    assert floating.module.state_dict().keys() == before.keys()
    sites = {site.name: site for site in floating.sites()}
    language = [site for site in result.sites if site.part == "language"]
    for number, site in enumerate(result.sites):
        planned = next(each for each in result.plan.sites if each.name == site.name)
        spec = result.plan.spec(planned)
        with installed(floating.module, language[:number], floating.step):
            needs = {sites[site.name]: Needs(spec.needs_hessian)}
            found = Found(collect(floating, needs, observations, noise_seed=0)[site.name])
        weights = {name: floating.weight(name) for name in planned.linears}
        assert_same({site.name: site}, {site.name: quantize_site(planned, spec, weights, {}, found, 10)})
        if number > 6:  # of the second block; the action sites come next
            break


def test_the_policy_is_left_alone() -> None:
    policy = ToyPolicy()
    before = {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}
    run(rules_for_both(FULL), policy)
    after = policy.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_progress_reaches_the_end() -> None:
    shares: list[float] = []
    run(rules_for_both(FULL), on_progress=lambda what, share: shares.append(share))
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite(bad: float) -> None:
    policy = ToyPolicy()
    with torch.no_grad():
        policy.module.get_parameter("language.k.weight")[1, 1] = bad
    with pytest.raises(CalibrationError, match=r"language\.k contains NaN or infinity"):
        run(rules_for_both({}), policy)


def test_a_recipe_with_statistics_needs_observations() -> None:
    with pytest.raises(CalibrationError, match="recipe 'test' needs calibration observations"):
        quantize_policy(ToyPolicy(), rules_for_both(FULL), None)


def test_a_recipe_without_statistics_needs_none() -> None:
    result = quantize_policy(ToyPolicy(), rules_for_both({}), None)
    assert isinstance(result, Quantized) and len(result.sites) == 3


def test_more_bits_come_closer() -> None:
    def error(bits: int) -> float:
        policy = ToyPolicy()
        total = 0.0
        for site in run(rules_for_both({"weight": {"bits": bits}}), policy).values():
            for name, (codes, scale) in codes_and_scales(site).items():
                difference = dequantize(codes, scale.float()) - policy.module.state_dict()[f"{name}.weight"]
                total += float(difference.square().sum())
        return total

    errors = [error(bits) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("rounding", ["gptq", "gptq_blockwise"])
def test_a_layer_that_a_solver_fails_on_is_named(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_policy, "WIDTH", 128)
    monkeypatch.setattr(ToyPolicy, "noise_shape", (3, 128))
    policy, silent = ToyPolicy(), toy_observations(8)
    silent.state[:] = 0
    weight = {"rounding": rounding, "group_size": 128, "scale_search": "mse_coarse"}
    rules = recipe(
        {"part": "language", "quantize": {"weight": weight}}, {"part": "action", "keep": "not of interest"}
    )
    with pytest.raises(CalibrationError, match=r"language\.input: the Hessian is zero"):
        quantize_policy(policy, rules, silent)


def test_an_input_that_is_not_finite_is_named() -> None:
    broken = toy_observations(8)
    broken.state[3, 2] = float("nan")
    with pytest.raises(CalibrationError, match=r"the input of language\.input contains NaN"):
        quantize_policy(ToyPolicy(), rules_for_both(FULL), broken)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_low_rank_branch_leaves_the_rest_to_be_rounded(rank: int) -> None:
    """Codes and branch together stand for the weight; with full rank nothing is left to round (SVDQuant Eq. 5)."""
    policy = ToyPolicy()
    site = run(rules_for_both({"weight": {"rank": rank}}), policy)["language.input"]
    for linear in site.linears:
        stored = linear.tensors
        assert stored["low_rank_up"].shape[1] == rank == len(stored["low_rank_down"])
        branch = stored["low_rank_up"].double() @ stored["low_rank_down"].double()
        rest = policy.module.state_dict()[f"{linear.name}.weight"].double() - branch
        expected = weight_scale(rest, 4)
        assert torch.equal(linear.scale.double(), expected)
        assert torch.equal(unpack(linear.packed, 4), quantize(rest, expected, 4))


def test_searched_factors_and_clips_do_not_raise_the_output_error() -> None:
    policy = ToyPolicy()
    needs = {site: Needs(hessian=True) for site in policy.sites()}
    gathered = collect(policy, needs, toy_observations(20), noise_seed=0)

    def error(table: dict[str, Any]) -> float:
        total = 0.0
        for site in run(rules_for_both(table), policy).values():
            hessian = gathered[site.name].hessian
            assert hessian is not None
            transform = site_transform(site)
            for name, (codes, scale) in codes_and_scales(site).items():
                difference = dequantize(codes, scale.double()) - transform.fold(weights_of(policy, site)[name])
                total += float(((difference @ transform.hessian(hessian.double())) * difference).sum())
        return total

    naive, searched = error({}), error({"transform": {"smoothing": "search"}})
    assert searched <= naive
    assert error({"weight": {"scale_search": "output"}}) <= naive
    assert error({"transform": {"smoothing": "search"}, "weight": {"scale_search": "output"}}) <= searched
