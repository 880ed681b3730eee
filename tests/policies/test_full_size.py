"""The released sizes, without values: what would be quantized, and whether recipes fit."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from omega_qvla.policies.lerobot_policy import LerobotPolicy
from omega_qvla.policies.stored import WEIGHTS_FILE
from omega_qvla.quantization import build_plan
from omega_qvla.spec import RecipeError, read_recipe, recipe_names, with_scope, with_settings
from tiny_policy import FAMILIES, save_vlm

PI = {"image_resolution": [224, 224]}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "pi05": PI,
    "pi0": PI,
    "smolvla": {"num_vlm_layers": 16, "expert_width_multiplier": 0.75, "resize_imgs_with_padding": [512, 512]},
}
# SmolVLM2-500M, on which the released SmolVLA is built.
SMOLLM2 = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15}
SMOLLM2 |= {"num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49280}
SIGLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SIGLIP |= {"image_size": 512, "patch_size": 16}


@pytest.fixture(scope="module")
def full_size(
    source: Callable[[str], Path],
    opened: Callable[[str], LerobotPolicy],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], LerobotPolicy]:
    """A policy of a family in its released size, all parameters on the meta device."""

    @cache
    def make(family: str) -> LerobotPolicy:
        directory = tmp_path_factory.mktemp("full") / family
        left_out = shutil.ignore_patterns("architecture.json", WEIGHTS_FILE)
        shutil.copytree(source(family), directory, ignore=left_out)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | CONFIGURATIONS[family]))
        if family == "smolvla":
            save_vlm(directory / "vlm", SMOLLM2, SIGLIP)
        adapter = type(opened(family))
        return adapter(adapter.without_values(directory), directory, "full size", "float")

    return make


@pytest.mark.parametrize(
    ("family", "linears", "language", "action"),
    [
        ("pi05", {"vision": 162, "language": 126, "action": 126}, 1_981_808_640, 311_427_072),
        ("pi0", {"vision": 162, "language": 126, "action": 126}, 1_981_808_640, 311_427_072),
        ("smolvla", {"vision": 72, "language": 112, "action": 112}, 157_286_400, 98_222_080),
    ],
)
def test_the_papers_count_of_layers(
    family: str, linears: dict[str, int], language: int, action: int, full_size: Callable[[str], LerobotPolicy]
) -> None:
    policy = full_size(family)
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for site in policy.sites():
        counts[site.part] += len(site.linears)
        weights[site.part] += sum(policy.module.get_submodule(name).weight.numel() for name in site.linears)
    assert counts == linears
    assert (weights["language"], weights["action"]) == (language, action)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_planned(family: str, full_size: Callable[[str], LerobotPolicy]) -> None:
    policy = full_size(family)
    plan = build_plan(read_recipe("rtn"), policy)
    linears = {name for name, module in policy.module.named_modules() if isinstance(module, nn.Linear)}
    assert {linear.name for linear in plan.linears} == linears
    quantized = {linear.name for linear in plan.linears if linear.site is not None}
    assert quantized == {name for site in policy.sites() if site.part != "vision" for name in site.linears}


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("family", ["pi05", "pi0"])
def test_every_recipe_fits_pi(family: str, name: str, full_size: Callable[[str], LerobotPolicy]) -> None:
    build_plan(read_recipe(name), full_size(family))


def test_smolvlas_expert_needs_smaller_blocks(full_size: Callable[[str], LerobotPolicy]) -> None:
    """It is 720 wide, which 64 does not divide and 16 does."""
    recipe = read_recipe("omega-int4")
    with pytest.raises(RecipeError, match=r"block_size = 64 does not divide the 720 inputs of .*lm_expert"):
        build_plan(recipe, full_size("smolvla"))
    sizes = ("transform.block_size", "weight.group_size", "activation.group_size")
    build_plan(with_settings(recipe, [f"action.{size}=16" for size in sizes]), full_size("smolvla"))


@pytest.mark.parametrize(("group", "saved"), [(64, 0.73), (128, 0.74)])
def test_the_vision_tower_of_pi05_is_quantized_too(
    group: int, saved: float, full_size: Callable[[str], LerobotPolicy]
) -> None:
    """414 linears; SigLIP's second MLP layer, which reads 4,304 channels, in blocks of 16."""
    settings = [f"weight.group_size={group}", f"activation.group_size={group}"]
    plan = build_plan(
        with_scope(with_settings(read_recipe("omega-int4"), settings), "with-vision"), full_size("pi05")
    )
    outputs = {linear.name: linear.out_features for linear in plan.linears}
    assert sum(linear.site is not None for linear in plan.linears) == 414
    stored = halves = 0
    for site in plan.sites:
        spec, rows = plan.spec(site), sum(outputs[name] for name in site.linears)
        narrow = site.in_features == 4304
        assert spec.transform.block_size == (16 if narrow else 64)
        assert spec.weight.group_size == (None if narrow else group) and spec.execution == "integer"
        halves += 2 * rows * site.in_features
        scales = rows * site.in_features // (spec.weight.group_size or site.in_features)
        stored += rows * site.in_features // 2 + 2 * scales + 8 * site.in_features  # smoothing, permutation
    assert abs(halves - 5.41e9) < 0.01e9  # as the paper has it
    assert 1 - stored / halves > saved
