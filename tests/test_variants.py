"""Other settings and other layers of a recipe."""

import pytest

from omega_qvla.policies.pi05 import PI05
from omega_qvla.quantization import build_plan
from omega_qvla.spec import RecipeError, read_recipe, recipe_names, scope_names, with_scope, with_settings


def specs(recipe: str, *settings: str) -> dict[str, object]:
    rules = with_settings(read_recipe(recipe), settings).rules
    return {rule.part: rule.quantize for rule in rules if rule.quantize is not None}


def test_a_setting_holds_for_every_rule_that_quantizes() -> None:
    found = specs("rtn", "weight.bits=3", "activation.bits = 8")
    assert found.keys() == {"language", "action"}
    assert {(s.weight.bits, s.activation.bits) for s in found.values()} == {(3, 8)}  # type: ignore[attr-defined]


def test_a_setting_of_one_part() -> None:
    found = specs("omega-int4", "action.weight.rounding=gptq", "language.transform.smoothing=null")
    assert found["action"].weight.rounding == "gptq"  # type: ignore[attr-defined]
    assert found["language"].transform.smoothing is None  # type: ignore[attr-defined]
    assert found["action"].transform.smoothing == 0.5  # type: ignore[attr-defined]


def test_nested_and_corrections() -> None:
    allocated = specs("qvla", "weight.allocation.average_bits=6.0")["vision"].weight.allocation  # type: ignore[attr-defined]
    assert allocated.average_bits == 6.0
    corrections = with_settings(read_recipe("quantvla"), ["corrections.limit=0.4"]).corrections
    assert corrections is not None and corrections.limit == 0.4


def test_settings_are_told_by_the_name() -> None:
    assert with_settings(read_recipe("rtn"), ["weight.bits=3"]).name == "rtn weight.bits=3"
    assert with_settings(read_recipe("rtn"), ["weight.bits=3"], name="mine").name == "mine"
    assert with_settings(read_recipe("rtn"), []) == read_recipe("rtn")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("activation.bit=8", r"activation\.bit: Unexpected keyword"),
        ("activation.bits=9", r"activation\.bits"),
        ("weight.rounding=gtpq", r"weight\.rounding: .*'gtpq'"),
        ("bits=8", "'bits=8' is no setting"),
        ("weight.bits", "'weight.bits' is no setting"),
        ("wheels.weight.bits=4", "is no setting"),
        ("vision.weight.bits=4", "quantizes nothing in part 'vision'"),
        ("corrections.limit=0.4", "has no corrections to set"),
    ],
)
def test_settings_that_do_not_belong(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        with_settings(read_recipe("rtn"), [setting])


@pytest.mark.parametrize("scope", scope_names())
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_plan_in_every_scope(floating: PI05, name: str, scope: str) -> None:
    if name == "qvla" and scope == "action":
        with pytest.raises(RecipeError, match="quantizes nothing in scope 'action'"):
            with_scope(read_recipe(name), scope)
        return
    plan = build_plan(with_scope(read_recipe(name), scope), floating)
    parts = {site.part for site in plan.sites}
    attention = [name for site in plan.sites if site.part == "action" for name in site.linears if "self_attn" in name]
    if scope == "language":
        assert "action" not in parts
    if scope == "action":
        assert "language" not in parts
    if scope == "without-head-attention":
        assert not attention
    if scope == "full":
        assert attention or name == "qvla"
    if scope == "with-vision":
        assert "vision" in parts


def test_the_scope_is_told_by_the_name() -> None:
    assert with_scope(read_recipe("rtn"), "language").name == "rtn (language)"
    assert with_scope(read_recipe("rtn"), "policy") == read_recipe("rtn")


def test_an_unknown_scope() -> None:
    with pytest.raises(RecipeError, match="there is no scope 'legs'; there are policy, "):
        with_scope(read_recipe("rtn"), "legs")
