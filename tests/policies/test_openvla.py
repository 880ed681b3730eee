"""A module of code that no package carries, quantized by its names: OpenVLA and OpenVLA-OFT."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from named_openvla import (
    ACTION_DIMENSION,
    CENTERS,
    FULL,
    ActionHead,
    NamedOpenVLA,
    Sizes,
    gradients,
    inference,
    inputs_of,
    random_images,
)
from omega_qvla.api import CalibrationSet
from omega_qvla.module_api import load_into, quantize_module
from omega_qvla.pack.checkpoint import read
from omega_qvla.pack.manifest import CheckpointError, Manifest
from omega_qvla.policies.action_tokens import expected_actions
from omega_qvla.policies.named_module import NamedModulePolicy, fit
from omega_qvla.policies.targets import TargetError, read_target, target_from_dict, target_names
from omega_qvla.policy import PreviousChunk
from omega_qvla.quantization import build_plan, quantize_policy
from omega_qvla.runtime import QuantizedLinear, installed
from omega_qvla.spec import Recipe, RecipeError, read_recipe, recipe_names, with_settings
from toy_policy import recipe

OPENVLA = read_target("openvla")
KEEP_ALL = recipe({"part": "vision", "keep": "to compare"}, {"part": "language", "keep": "to compare"})
FEW = ["weight.allocation.remeasured=2", "weight.allocation.observations=2", "weight.allocation.directions=1"]
RECIPES: dict[str, Recipe] = {
    "kept": KEEP_ALL,
    "rtn": read_recipe("rtn"),
    "omega-int4": read_recipe("omega-int4"),
    "awq": read_recipe("awq"),
    "qvla": with_settings(read_recipe("qvla"), FEW, name="qvla"),
}
CALIBRATION = CalibrationSet(random_images(4), ("random:0",))
UNSEEN = random_images(3, seed=1)


def built(seed: int = 0, sizes: Sizes | None = None) -> NamedOpenVLA:
    torch.manual_seed(seed)
    return NamedOpenVLA(sizes or Sizes()).eval()


@torch.no_grad()
def logits(vla: NamedOpenVLA) -> Tensor:
    return vla(*inputs_of(UNSEEN))


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of a released model."""
    directory = tmp_path_factory.mktemp("released") / "openvla-7b"
    directory.mkdir()
    for name in ("config.json", "tokenizer.model", "modeling_prismatic.py", "model.safetensors.index.json"):
        (directory / name).write_text(name)
    (directory / "model-00001-of-00001.safetensors").write_text("weights")
    return directory


def quantize(vla: NamedOpenVLA, how: Recipe | str, out: Path, source: Path, **others: Any) -> Manifest:
    others = {"calibration": CALIBRATION, "differentiable_actions": gradients(vla)} | others
    return quantize_module(vla, "openvla", how, out, source=source, infer=inference(vla), **others)


@pytest.fixture(scope="session")
def packed(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The quantized checkpoint of one of RECIPES; read-only."""

    @cache
    def make(name: str) -> Path:
        out = tmp_path_factory.mktemp("packed") / name
        quantize(built(), RECIPES[name], out, released)
        return out

    return make


@pytest.fixture(scope="session")
def full_size() -> NamedModulePolicy:
    """OpenVLA-7B without values."""
    with init_empty_weights(include_buffers=False):
        vla = NamedOpenVLA(FULL)
    return NamedModulePolicy(vla, OPENVLA, Path(), inference(vla))


def test_the_published_number_of_layers(full_size: NamedModulePolicy) -> None:
    linears: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for site in full_size.sites():
        linears[site.part] += len(site.linears)
        weights[site.part] += sum(full_size.module.get_submodule(name).weight.numel() for name in site.linears)
    assert linears == {"vision": (24 + 27) * 4, "language": 32 * 7}
    assert weights["language"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert weights["vision"] == 24 * (4 + 8) * 1024**2 + 27 * (4 * 1152**2 + 2 * 1152 * 4304)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_fits_the_released_size(name: str, full_size: NamedModulePolicy) -> None:
    plan = build_plan(OPENVLA.narrowed(read_recipe(name)), full_size)
    linears = {name for name, found in full_size.module.named_modules() if isinstance(found, nn.Linear)}
    assert {linear.name for linear in plan.linears} == linears
    kept = {linear.name: linear.kept_because for linear in plan.linears if linear.site is None}
    for name in ("projector.fc3", "language_model.lm_head", "vision_backbone.fused_featurizer.attn_pool.kv"):
        assert kept[name] == full_size.kept_because(name)


def test_sites_are_what_reads_one_tensor_in_the_order_of_the_calls() -> None:
    vla, calls = built(), []
    linears = {name: found for name, found in vla.named_modules() if isinstance(found, nn.Linear)}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, inputs, name=name: calls.append((inputs[0], name)))
    logits(vla)
    read: dict[int, list[str]] = {}
    for x, name in calls:
        read.setdefault(id(x), []).append(name)
    sites = [list(block_site.linears) for block in fit(vla, OPENVLA) for block_site in block.sites()]
    assert [names for names in read.values() if names in sites] == sites


def test_a_model_with_one_tower() -> None:
    """As the first OpenVLA had it."""
    names = [block.name for block in fit(built(sizes=Sizes(siglip=None)), OPENVLA)]
    assert [name for name in names if "vision" in name] == [f"vision_backbone.featurizer.blocks.{i}" for i in (0, 1)]


@pytest.mark.parametrize("name", ["rtn", "omega-int4", "awq", "qvla"])
def test_a_loaded_module_computes_what_was_quantized(name: str, packed: Callable[[str], Path]) -> None:
    """In integers and simulated, into a module with other weights and into one without any."""
    vla = built()
    policy = NamedModulePolicy(vla, OPENVLA, Path(), inference(vla), differentiable_actions=gradients(vla))
    quantized = quantize_policy(policy, OPENVLA.narrowed(RECIPES[name]), CALIBRATION.observations)
    with installed(vla, quantized.sites, policy.step):
        expected = logits(vla)
    assert torch.isfinite(expected).all() and not torch.equal(expected, logits(vla))
    for execution in ("integer", "simulated"):
        other = built(seed=1)
        manifest = load_into(other, "openvla", packed(name), execution)
        assert manifest.plan.recipe.name == name
        assert torch.equal(logits(other), expected)
        assert inference(other)(UNSEEN).shape == (len(UNSEEN), 1, ACTION_DIMENSION)
    with init_empty_weights(include_buffers=False):
        empty = NamedOpenVLA(Sizes())
    load_into(empty, "openvla", packed(name))
    assert torch.equal(logits(empty), expected)
    replaced = {name for name, found in empty.named_modules() if isinstance(found, QuantizedLinear)}
    assert replaced == {linear.name for site in quantized.sites for linear in site.linears}
    assert not {f"{name}.weight" for name in replaced} & set(empty.state_dict())


def test_a_recipe_that_keeps_everything_changes_nothing(packed: Callable[[str], Path]) -> None:
    other = built(seed=1)
    load_into(other, OPENVLA, packed("kept"))
    assert torch.equal(logits(other), logits(built()))


def test_bits_go_where_the_actions_feel_them(packed: Callable[[str], Path]) -> None:
    """The last block of each tower runs and nothing reads it: its channels get no bits."""
    checkpoint = read(packed("qvla"))
    widths = {linear.name: linear.tensors["widths"] for site in checkpoint.sites for linear in site.linears}
    assert {name.split(".")[0] for name in widths} == {"vision_backbone", "language_model"}
    for name, bits in widths.items():
        assert ("vision" in name and ".blocks.1." in name) == (not bits.any()), name


def test_quantizing_leaves_the_module_as_it_was(released: Path, tmp_path: Path) -> None:
    vla = built()
    before = {name: tensor.clone() for name, tensor in vla.state_dict().items()}
    quantize(vla, "omega-int4", tmp_path / "out", released)
    assert all(torch.equal(before[name], tensor) for name, tensor in vla.state_dict().items())


def test_the_checkpoint_has_everything_but_the_weights(packed: Callable[[str], Path]) -> None:
    checkpoint = read(packed("rtn"))
    files = {path.name for path in checkpoint.policy_directory.iterdir()}
    assert files == {"config.json", "tokenizer.model", "modeling_prismatic.py"}
    manifest = checkpoint.manifest
    assert (manifest.family, manifest.source.directory) == ("openvla", "openvla-7b")
    assert {rule.part for rule in manifest.plan.recipe.rules} == {"vision", "language"}


def test_the_head_and_the_projector_of_oft_are_kept(released: Path, tmp_path: Path) -> None:
    def attached(seed: int) -> NamedOpenVLA:
        vla = built(seed)
        vla.action_head, vla.proprio_projector = ActionHead(64), nn.ModuleDict({"fc1": nn.Linear(8, 64)})
        return vla

    manifest = quantize(attached(0), "rtn", tmp_path / "oft", released, calibration=None)
    kept = {linear.name: linear.kept_because for linear in manifest.plan.linears if linear.kept_because}
    assert "QVLA" in kept["action_head.model.mlp_resnet_blocks.0.ffn.1"]
    assert "state" in kept["proprio_projector.fc1"]
    other = attached(1)
    load_into(other, "openvla", tmp_path / "oft")
    assert torch.equal(other.action_head.model["fc1"].weight, attached(0).action_head.model["fc1"].weight)
    with pytest.raises(CheckpointError, match="the module lacks the linear action_head"):
        load_into(built(), "openvla", tmp_path / "oft")


def refused(kind: type[Exception], message: str, out: Path, source: Path, **others: Any) -> None:
    vla = others.pop("vla", None) or built()
    with pytest.raises(kind, match=message):
        quantize(vla, others.pop("how", "rtn"), out, source, **others)
    assert not out.exists()


def test_a_linear_that_the_target_does_not_know(released: Path, tmp_path: Path) -> None:
    vla = built()
    vla.depth_head = nn.Linear(4, 4)
    refused(TargetError, "does not know the linear layer depth_head; name it in", tmp_path / "out", released, vla=vla)
    with pytest.raises(KeyError, match="depth_head"):
        NamedModulePolicy(vla, OPENVLA, released, inference(vla)).kept_because("depth_head")


def test_names_that_are_not_there(released: Path, tmp_path: Path) -> None:
    layer = "language_model.model.layers.1.self_attn"
    vla = built()
    del vla.get_submodule(layer).k_proj
    refused(TargetError, rf"the module has no {layer}\.k_proj", tmp_path / "out", released, vla=vla)
    vla = built()
    vla.get_submodule(layer).k_proj = nn.ModuleDict({"base_layer": nn.Linear(64, 64)})
    refused(TargetError, "k_proj is a ModuleDict instead of .*merge adapters", tmp_path / "out", released, vla=vla)
    vla = built()
    vla.vision_backbone = nn.ModuleDict({"vision_backbone": vla.vision_backbone})
    refused(TargetError, r"has no vision_backbone\.featurizer\.blocks", tmp_path / "out", released, vla=vla)
    vla = built()
    vla.language_model.model.layers = nn.ModuleList()
    refused(TargetError, "instead of a list of blocks at language_model", tmp_path / "out", released, vla=vla)


def test_what_cannot_be_quantized(released: Path, packed: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(RecipeError, "give differentiable_actions", out, released, how="qvla", differentiable_actions=None)
    refused(RecipeError, "no attention there to correct", out, released, how="quantvla")
    refused(ValueError, "needs calibration observations", out, released, how="omega-int4", calibration=None)
    refused(CheckpointError, "there is no directory", out, tmp_path / "nothing")
    damaged = built()
    damaged.projector.fc1.bias.data[0] = torch.nan
    refused(CheckpointError, r"projector\.fc1\.bias contains NaN", out, released, vla=damaged, how=KEEP_ALL)
    vla = built().to("meta")
    refused(TargetError, "the module is on meta; .* move it there", out, released, vla=vla)
    loaded = built()
    load_into(loaded, "openvla", packed("rtn"))
    refused(TargetError, "is a QuantizedLinear instead of", out, released, vla=loaded)
    with pytest.raises(CheckpointError, match="already exists"):
        quantize(built(), "rtn", packed("rtn"), released)


def test_actions_of_a_wrong_shape_or_not_finite(released: Path) -> None:
    noise = torch.zeros(len(UNSEEN), 0, 0)
    for returned, message in ((torch.zeros(3, 7), "shape"), (torch.full((3, 1, 7), torch.nan), "NaN")):
        policy = NamedModulePolicy(built(), OPENVLA, released, lambda _, actions=returned: actions)
        with pytest.raises(ValueError, match=message):
            policy.infer(UNSEEN, noise)
    vla = built()
    policy = NamedModulePolicy(vla, OPENVLA, released, inference(vla))
    assert policy.denoise(UNSEEN, noise).shape == (1, len(UNSEEN), 1, ACTION_DIMENSION)
    with pytest.raises(ValueError, match="takes no previous chunk; leave it out"):
        policy.infer(UNSEEN, noise, PreviousChunk(np.zeros((len(UNSEEN), 1, ACTION_DIMENSION), np.float32), 0))


def test_what_a_policy_says_of_its_tensors(released: Path) -> None:
    vla = built()
    policy = NamedModulePolicy(vla, OPENVLA, released, inference(vla))
    stored, states = policy.stored_tensors(), vla.state_dict()
    assert {name: (stored.shape(name), stored.dtype(name)) for name in stored.names()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in states.items()
    }
    assert policy.resident_bytes() == sum(tensor.nbytes for tensor in [*vla.parameters(), *vla.buffers()])
    qkv, q = "vision_backbone.featurizer.blocks.0.attn.qkv", "language_model.model.layers.0.self_attn.q_proj"
    assert torch.equal(policy.weight(qkv), states[f"{qkv}.weight"])
    assert torch.equal(policy.bias(qkv), states[f"{qkv}.bias"]) and policy.bias(q) is None


def test_a_checkpoint_that_does_not_fit_leaves_the_module_as_it_was(packed: Callable[[str], Path]) -> None:
    def load_fails(vla: NamedOpenVLA, message: str, target: Any = OPENVLA) -> None:
        before = logits(vla)
        with pytest.raises(CheckpointError, match=message):
            load_into(vla, target, packed("rtn"))
        assert torch.equal(logits(vla), before)

    data = read_target_data() | {"name": "other"}
    load_fails(built(), "holds a policy of family 'openvla', not of target 'other'", target_from_dict(data))
    load_fails(built(sizes=Sizes(llama=(64, 128, 3, 4))), r"the checkpoint lacks the linear .*layers\.2")
    load_fails(built(sizes=Sizes(llama=(64, 96, 2, 4))), r"mlp\.\w+_proj has shape .* in the module it has")
    load_fails(built(sizes=Sizes(patch=2)), r"patch_embed\.proj\.weight has shape")
    vla = built()
    vla.temperature = nn.Parameter(torch.ones(1))
    load_fails(vla, "lacks temperature and 0 other tensors of the policy")
    vla = built()
    vla.language_model.model.norm = nn.Identity()
    load_fails(vla, r"holds language_model\.model\.norm\.weight and 0 other tensors unknown to the policy")


def read_target_data() -> dict[str, Any]:
    """A target as it stands in TOML."""
    stack = {"part": "language", "blocks": "layers", "inputs": {"x": ["q", "k"], "y": ["o"]}}
    return {"name": "mine", "summary": "", "source": "", "stacks": [stack], "kept": {"head": "small"}, "files": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "extra"),
        ({"stacks": []}, "a target needs a stack"),
        ({"kept": {"(": "small"}}, "is no regular expression"),
        ({"stacks": [{"part": "action", "blocks": "layers", "inputs": {"x": ["q"]}}]}, r"stacks\.0\.part"),
        ({"stacks": [{"part": "language", "blocks": "layers", "inputs": {"x": []}}]}, "needs a linear that reads it"),
        ({"stacks": [{"part": "language", "blocks": "l", "inputs": {"x": ["q"], "y": ["q"]}}]}, "q reads two inputs"),
    ],
)
def test_a_target_is_read_strictly(change: dict[str, Any], message: str) -> None:
    target_from_dict(read_target_data())
    with pytest.raises(TargetError, match=message):
        target_from_dict(read_target_data() | change)


def test_targets_by_name_and_from_files(tmp_path: Path) -> None:
    assert target_names() == ["openvla"]
    own = tmp_path / "mine.toml"
    with pytest.raises(TargetError, match=r"there is no target file .*mine\.toml"):
        read_target(own)
    own.write_text("name = 1")
    with pytest.raises(TargetError, match=r"mine\.toml: "):
        read_target(own)
    data = json.dumps(read_target_data()["stacks"][0]["inputs"]).replace(":", " =")
    head = 'name = "mine"\nsummary = ""\nsource = ""\nfiles = []\n[kept]\n'
    own.write_text(f'{head}[[stacks]]\npart = "language"\nblocks = "layers"\ninputs = {data}\n')
    assert read_target(own).stacks[0].inputs == {"x": ("q", "k"), "y": ("o",)}
    with pytest.raises(TargetError, match="there is no target 'mine'; there are openvla"):
        read_target("mine")


def test_expected_actions() -> None:
    """Where the distribution is sharp they are what decoding gives; elsewhere the mean; gradients flow."""
    tokens = torch.tensor([5, 3, 4])
    values = torch.tensor([-1.0, 0.0, 1.0])
    sharp = torch.zeros(2, 3, 6)
    sharp[:, [0, 1, 2], [5, 3, 4]] = 100
    sharp[..., 0] = 1000  # a token that means no action
    assert torch.equal(expected_actions(sharp, tokens, values), values.expand(2, 1, 3))
    flat = torch.zeros(1, 1, 6, requires_grad=True)
    mean = expected_actions(flat, tokens, values)
    mean.sum().backward()
    assert mean.item() == 0 and torch.equal(flat.grad[0, 0].sign(), torch.tensor([0.0, 0, 0, 0, 1, -1]))
    with pytest.raises(ValueError, match="not one for one"):
        expected_actions(flat, tokens, CENTERS)
