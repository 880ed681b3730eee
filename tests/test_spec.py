import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omega_qvla.spec import RecipeError, read_recipe, recipe_from_dict, recipe_names, recipe_to_dict

EXECUTIONS = {
    "awq": "dequantized",
    "duquant": "simulated",
    "gptq": "dequantized",
    "omega-int4": "integer",
    "omega-qvla": "simulated",
    "omega-qvla-released": "simulated",
    "omniquant": "dequantized",
    "quantvla": "simulated",
    "qvla": "dequantized",
    "rtn": "integer",
    "smoothquant": "integer",
}


def recipe_with(quantize: Any, **rule: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "summary": "for a test",
        "rules": [{"part": "language", "quantize": quantize} | rule],
    }


def test_bundled_recipes_are_listed() -> None:
    assert recipe_names() == sorted(EXECUTIONS)


@pytest.mark.parametrize("name", recipe_names())
def test_bundled_recipes_survive_json(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name and recipe.summary
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_bundled_recipes_decide_about_every_part(name: str) -> None:
    assert {rule.part for rule in read_recipe(name).rules} == {"vision", "language", "action"}


def test_which_recipes_integers_can_execute() -> None:
    assert {name: read_recipe(name).execution for name in recipe_names()} == EXECUTIONS


def test_recipe_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nsummary = ""\n[[rules]]\npart = "language"\nkeep = "to compare"\n')
    assert read_recipe(file).rules[0].keep == "to compare"
    assert read_recipe(str(file)).name == "mine"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (recipe_with({"wight": {}}), r"rules\.0\.quantize\.wight: .*Unexpected"),
        (recipe_with({"weight": {"bit": 4}}), r"rules\.0\.quantize\.weight\.bit: "),
        (recipe_with({"weight": {"bits": 9}}), r"weight\.bits: .*less than or equal to 8.* 16 \(found 9\)"),
        (recipe_with({"weight": {"bits": 1}}), r"weight\.bits: .*greater than or equal to 2.* 16 \(found 1\)"),
        (recipe_with({"weight": {"bits": "4"}}), r"weight\.bits: .*integer.* 16 \(found '4'\)"),
        (
            recipe_with({"weight": {"rounding": "gtpq"}}),
            r"weight\.rounding: .*'rtn', 'gptq' or 'gptq_blockwise' \(found 'gtpq'\)",
        ),
        (recipe_with({"transform": {"smoothing": "a"}}), r"transform\.smoothing: "),
        (recipe_with({"transform": {"sharing": "layer"}}), r"transform\.sharing: .*'site' or 'linear'"),
        (recipe_with({}, part="wheels"), r"rules\.0\.part: .*'vision', 'language' or 'action'"),
        (recipe_with({}, surprise=1), r"rules\.0\.surprise: "),
        (recipe_with({}) | {"author": "me"}, r"author: "),
        ({"name": "test", "summary": ""}, r"rules: .*required"),
    ],
)
def test_keys_and_values_that_do_not_belong_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict(data)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ({"granularity": "token", "mode": "per_step"}, "'token' does not go with mode 'per_step'"),
        ({"granularity": "channel"}, "'channel' does not go with mode 'dynamic'"),
        ({"granularity": "token_group"}, "group_size belongs to granularity 'token_group'"),
        ({"granularity": "token", "group_size": 64}, "group_size belongs to granularity 'token_group'"),
    ],
)
def test_activation_scales_that_do_not_exist(activation: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict(recipe_with({"activation": activation}))


def test_groups_that_differ() -> None:
    activation = {"granularity": "token_group", "group_size": 32}
    with pytest.raises(RecipeError, match="weights in groups of 64 and activations in groups of 32"):
        recipe_from_dict(recipe_with({"weight": {"group_size": 64}, "activation": activation}))


def test_a_rule_quantizes_or_keeps() -> None:
    for both_or_neither in (recipe_with({}, keep="why"), recipe_with(None)):
        with pytest.raises(RecipeError, match="either a `quantize` table or a `keep` reason"):
            recipe_from_dict(both_or_neither)


def test_a_pattern_that_is_no_regular_expression() -> None:
    with pytest.raises(RecipeError, match=r"rules\.0: .*'\(q_proj' is no regular expression"):
        recipe_from_dict(recipe_with({}, match="(q_proj"))


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'omega-int5'; there are .*omega-int4.*rtn"):
        read_recipe("omega-int5")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe file .*mine\.toml"):
        read_recipe(tmp_path / "mine.toml")


@pytest.mark.parametrize("text", ["name = ", 'name = "a"\nsummary = 3\nrules = []\n'])
def test_broken_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"mine\.toml: "):
        read_recipe(file)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("omega_qvla", ("torch", "lerobot", "metaworld", "transformers")),
        ("omega_qvla.spec", ("torch", "lerobot", "metaworld", "transformers")),
        ("omega_qvla.pack.inspect", ("lerobot", "metaworld", "mujoco", "transformers")),
        ("omega_qvla.runtime", ("lerobot", "metaworld", "mujoco", "transformers")),
        ("omega_qvla.cli", ("lerobot", "metaworld", "mujoco", "transformers")),
    ],
)
def test_what_a_room_imports(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
