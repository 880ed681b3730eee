"""Law 6: a plan is total."""

from typing import Any

import pytest
from torch import nn

import toy_policy
from omega_qvla.policies.pi05 import PI05
from omega_qvla.quantization import build_plan
from omega_qvla.spec import RecipeError, read_recipe, recipe_names, with_settings
from toy_policy import ToyPolicy, recipe, rules_for_both

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LEAVES = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
STACKS = ("paligemma.model.language_model", "gemma_expert.model")
KEEP_ALL = [{"part": part, "keep": "to compare"} for part in ("vision", "language", "action")]


@pytest.mark.parametrize("name", recipe_names())
def test_every_linear_is_planned_once(floating: PI05, name: str) -> None:
    plan = build_plan(read_recipe(name), floating)
    linears = [name for name, module in floating.module.named_modules() if isinstance(module, nn.Linear)]
    assert [linear.name for linear in plan.linears] == linears
    assert all((linear.site is None) != (not linear.kept_because) for linear in plan.linears)
    in_sites = [name for site in plan.sites for name in site.linears]
    assert len(in_sites) == len(set(in_sites))
    assert set(in_sites) == {linear.name for linear in plan.linears if linear.site is not None}
    assert len({site.name for site in plan.sites}) == len(plan.sites)


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"quantvla", "qvla"}))  # these keep layers of the head
def test_language_and_action_at_w4a4(floating: PI05, name: str) -> None:
    plan = build_plan(with_settings(read_recipe(name), ["activation.bits=4"]), floating)
    bits = {
        linear: (plan.spec(site).weight.bits, plan.spec(site).activation.bits)
        for site in plan.sites
        for linear in site.linears
    }
    expected = {
        f"model.paligemma_with_expert.{stack}.layers.{layer}.{leaf}"
        for stack in STACKS
        for layer in range(2)
        for leaf in LEAVES
    }
    assert bits == dict.fromkeys(expected, (4, 4))


def test_linears_that_read_one_input_share_a_site(floating: PI05) -> None:
    plan = build_plan(read_recipe("omega-int4"), floating)
    shared = {tuple(name.split(".")[-1] for name in site.linears) for site in plan.sites}
    assert shared == {
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    }


def test_sites_of_one_linear_each(floating: PI05) -> None:
    plan = build_plan(read_recipe("omega-qvla"), floating)
    assert all(len(site.linears) == 1 for site in plan.sites)
    assert all(site.name == f"{site.linears[0]}.input" for site in plan.sites)


def test_the_first_rule_that_matches_decides() -> None:
    plan = build_plan(
        recipe(
            {"part": "language", "match": "k$", "keep": "small"},
            {"part": "language", "quantize": {}},
            {"part": "action", "quantize": {"weight": {"bits": 8}}},
        ),
        ToyPolicy(),
    )
    assert [(site.linears, site.rule) for site in plan.sites] == [
        (("language.q",), 1),
        (("action.up",), 2),
        (("action.down",), 2),
    ]
    kept = {linear.name: linear.kept_because for linear in plan.linears if linear.site is None}
    assert kept == {"language.k": "small", "head": "the head"}


def test_rules_may_quantize_the_linears_of_an_input_differently() -> None:
    table = {"weight": {"bits": 8}}
    plan = build_plan(
        recipe(
            {"part": "language", "match": "k$", "quantize": table},
            {"part": "language", "quantize": {}},
            {"part": "action", "quantize": {}},
        ),
        ToyPolicy(),
    )
    names = [site.name for site in plan.sites]
    assert len(names) == len(set(names)) == 4


def test_a_rule_that_matches_nothing() -> None:
    unmatched: dict[str, Any] = {"part": "language", "match": "no_such_layer", "quantize": {}}
    with pytest.raises(RecipeError, match=r"rule 0 of recipe 'test' .*'no_such_layer'\) matches no linear"):
        build_plan(recipe(unmatched, *KEEP_ALL[1:]), ToyPolicy())


def test_a_part_that_the_policy_lacks() -> None:
    with pytest.raises(RecipeError, match=r"rule 2 .*part 'vision'.* matches no linear of this policy"):
        build_plan(recipe(*KEEP_ALL[1:], KEEP_ALL[0]), ToyPolicy())


def test_a_layer_that_no_rule_decides_about() -> None:
    with pytest.raises(RecipeError, match=r"no rule of recipe 'test' decides about action\.up"):
        build_plan(recipe(KEEP_ALL[1]), ToyPolicy())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"transform": {"rotation": "svd", "block_size": 5}},
            r"transform\.block_size = 5 does not divide the 16",
        ),
        ({"transform": {"permutation": "zigzag", "block_size": 32}}, r"transform\.block_size = 32 does not"),
        (
            {"transform": {"output_rotation": "svd", "block_size": 7}},
            r"transform\.block_size = 7 does not divide the 16 outputs of language\.q",
        ),
        ({"weight": {"rank": 9}}, r"weight\.rank = 9 is more than language\.k \[8, 16\] has"),
        ({"transform": {"rotation": "svd", "block_size": 0}}, r"transform\.block_size = 0 does not divide"),
        (
            {"weight": {"group_size": 24}},
            r"weight\.group_size = 24 does not divide the 16 inputs of language\.input",
        ),
        (
            {"activation": {"granularity": "token_group", "group_size": 64}},
            r"activation\.group_size = 64 does not divide the 16 inputs of language\.input",
        ),
    ],
)
def test_sizes_that_do_not_fit(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_plan(rules_for_both(table), ToyPolicy())


def test_language_has_no_denoising_steps() -> None:
    table = {"activation": {"granularity": "channel", "mode": "per_step"}}
    with pytest.raises(RecipeError, match=r"language\.input does not run in denoising steps"):
        build_plan(rules_for_both(table), ToyPolicy())


def test_a_hadamard_matrix_needs_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_policy, "WIDTH", 24)
    monkeypatch.setattr(toy_policy, "HIDDEN", 48)
    table = {"transform": {"rotation": "hadamard", "block_size": 12}}
    with pytest.raises(RecipeError, match=r"transform\.block_size = 12 is no power of two"):
        build_plan(rules_for_both(table), ToyPolicy())
