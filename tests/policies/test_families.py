"""What holds for the policy of every family: anatomy, inference, and what becomes of it when it is quantized."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omega_qvla import api
from omega_qvla.pack.checkpoint import read
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies import load_policy, open_policy
from omega_qvla.policies.lerobot_policy import LerobotPolicy
from omega_qvla.policies.stored import WEIGHTS_FILE
from omega_qvla.policy import Observation
from omega_qvla.quantization.sensitivity import ActionProbe
from omega_qvla.runtime import QuantizedLinear
from tiny_policy import ACTION_DIM, CHUNK, FAMILIES, SCALES, random_noise
from toy_policy import recipe

Source = Callable[[str], Path]
Packed = Callable[[str, str], Path]
Opened = Callable[[str], LerobotPolicy]

pytestmark = pytest.mark.parametrize("family", FAMILIES)

RECIPES = ("kept", "rtn", "omega-int4")
IN_A_BLOCK = re.compile(r"\.layers\.\d+\.(self_attn|mlp)\.")
ACTION_OUT = "model.action_out_proj.weight"


@pytest.fixture(scope="module")
def elsewhere(
    packed: Packed, infer_elsewhere: Callable[[list[Path]], list[np.ndarray]]
) -> dict[tuple[str, str], np.ndarray]:
    """Actions of the quantized policies in a new process."""
    names = [(family, name) for family in FAMILIES for name in RECIPES]
    return dict(zip(names, infer_elsewhere([packed(*name) for name in names]), strict=True))


def linears_of(policy: LerobotPolicy) -> dict[str, nn.Linear]:
    return {name: module for name, module in policy.module.named_modules() if isinstance(module, nn.Linear)}


def altered(source: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a floating-point checkpoint with other tensors."""
    shutil.copytree(source, out)
    tensors = load_file(out / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    return out


# Anatomy


def test_sites_hold_the_linears_of_the_blocks_and_each_once(family: str, opened: Opened) -> None:
    policy = opened(family)
    held = [linear for site in policy.sites() for linear in site.linears]
    assert len(held) == len(set(held))
    assert set(held) == {name for name in linears_of(policy) if IN_A_BLOCK.search(name)}
    assert {site.part for site in policy.sites()} == {"vision", "language", "action"}


def test_every_other_linear_is_kept_for_a_reason(family: str, opened: Opened) -> None:
    policy = opened(family)
    others = [name for name in linears_of(policy) if not IN_A_BLOCK.search(name)]
    assert all(policy.kept_because(name) for name in others)
    with pytest.raises(KeyError, match=f"the {family} adapter does not know the linear layer"):
        policy.kept_because("model.new_projection")


def test_a_site_is_what_reads_one_tensor_in_the_order_of_execution(
    family: str, opened: Opened, observations: Observation, noise: Tensor
) -> None:
    """In every call, all linears of a site read the same tensor, and the next site reads another."""
    policy = opened(family)
    reads: list[tuple[str, Tensor]] = []

    def listener(name: str) -> Callable[..., None]:
        return lambda module, inputs: reads.append((name, inputs[0]))

    names = [linear for site in policy.sites() for linear in site.linears]
    handles = [policy.module.get_submodule(name).register_forward_pre_hook(listener(name)) for name in names]
    policy.infer(observations[:2], noise[:2])
    for handle in handles:
        handle.remove()
    runs = [frozenset(name for name, _ in run) for _, run in groupby(reads, key=lambda read: id(read[1]))]
    sites = {frozenset(site.linears): site for site in policy.sites()}
    assert list(dict.fromkeys(runs)) == list(sites)
    counts = {"vision": len(observations.images), "language": 1, "action": policy.denoising_steps}
    assert all(runs.count(linears) == counts[site.part] for linears, site in sites.items())


# Inference


def test_actions_are_what_lerobot_computes(family: str, opened: Opened, observations: Observation) -> None:
    """The adapter's input and output, against lerobot's processors and model called one by one."""
    policy, noise = opened(family), random_noise(8, 2)
    batch = {f"observation.images.{name}": torch.from_numpy(x) for name, x in observations.images.items()}
    batch = {key: x.permute(0, 3, 1, 2).float() / 255 for key, x in batch.items()}
    batch |= {"observation.state": torch.from_numpy(observations.state)}
    prepared = policy._preprocessor(batch | {"task": list(observations.instructions)})
    chunk = policy.module.predict_action_chunk(prepared, noise=noise)
    assert np.array_equal(policy.infer(observations, noise), policy._postprocessor(chunk).numpy())


def test_actions(family: str, opened: Opened, observations: Observation, noise: Tensor) -> None:
    policy = opened(family)
    actions = policy.infer(observations, noise)
    assert actions.shape == (8, CHUNK, ACTION_DIM) and actions.dtype == np.float32
    assert np.isfinite(actions).all() and actions.std() > 0.1
    assert np.array_equal(actions, policy.infer(observations, noise))
    assert not np.allclose(actions, policy.infer(observations, noise + 0.1))


def test_every_input_matters(family: str, opened: Opened, observations: Observation, noise: Tensor) -> None:
    policy = opened(family)
    actions = policy.infer(observations, noise)
    dark = {name: image * (name != "front") for name, image in observations.images.items()}
    changes = [
        replace(observations, images=dark),
        replace(observations, state=-observations.state),
        replace(observations, instructions=("push the puck",) * 8),
    ]
    for changed in changes:
        assert not np.allclose(actions, policy.infer(changed, noise), atol=1e-4)


def test_lerobots_loop_passes_the_steps_in_order(
    family: str, source: Source, observations: Observation, noise: Tensor
) -> None:
    policy, seen = open_policy(source(family)), []
    layer = policy.module.get_submodule(policy.sites()[-1].linears[0])
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(policy.step.current))
    for _ in range(2):
        seen.clear()
        policy.infer(observations[:1], noise[:1])
        assert seen == list(range(10))
        assert not policy.step.running


def test_an_exception_in_the_loop_ends_the_step(
    family: str, source: Source, observations: Observation, noise: Tensor
) -> None:
    policy = open_policy(source(family))

    def fail(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if policy.step.current == 4:
            raise ZeroDivisionError

    expected = policy.infer(observations[:1], noise[:1])
    layer = policy.module.get_submodule(policy.sites()[-1].linears[0])
    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        policy.infer(observations[:1], noise[:1])
    assert not policy.step.running
    handle.remove()
    assert np.array_equal(policy.infer(observations[:1], noise[:1]), expected)


@pytest.mark.parametrize("name", [*RECIPES, "omega-qvla"])
def test_denoising_ends_in_the_actions(
    family: str, name: str, packed: Packed, observations: Observation, noise: Tensor
) -> None:
    policy = load_policy(packed(family, name))
    chunks = policy.denoise(observations[:2], noise[:2])
    assert chunks.shape == (10, 2, CHUNK, ACTION_DIM + 2)
    actions = torch.from_numpy(policy.infer(observations[:2], noise[:2]))
    assert torch.allclose(chunks[-1, ..., :ACTION_DIM] * torch.tensor(SCALES), actions, rtol=1e-4, atol=1e-5)
    assert (chunks[1:] - chunks[:-1]).flatten(1).norm(dim=1).min() > 0


def test_differentiable_actions_are_those_of_inference(
    family: str, opened: Opened, observations: Observation, noise: Tensor
) -> None:
    policy = opened(family)
    actions = policy.differentiable_actions(observations[:2], noise[:2])
    assert actions.requires_grad and actions.shape == (2, CHUNK, ACTION_DIM)
    assert np.array_equal(policy._postprocessor(actions.detach()).numpy(), policy.infer(observations[:2], noise[:2]))


def test_gradients_reach_every_site_that_reaches_the_actions(
    family: str, opened: Opened, observations: Observation
) -> None:
    """Of the last language layer only keys and values do."""
    policy = opened(family)
    sites = policy.sites()
    last = [site.block for site in sites if site.part == "language"][-1]
    after_keys_and_values = {site.name for site in sites if site.block == last} - {f"{last}.attention_input"}
    gains = ActionProbe(policy, observations[:2], noise_seed=0).gains([n for s in sites for n in s.linears], 1)
    dead = {site.name for site in sites if not any(gains[name].any() for name in site.linears)}
    assert dead == after_keys_and_values


@pytest.mark.parametrize("name", ["kept", "omega-int4"])
def test_a_missing_camera(family: str, name: str, packed: Packed, observations: Observation, noise: Tensor) -> None:
    blind = replace(observations, images={"back": observations.images["back"]})
    with pytest.raises(ValueError, match="camera 'front' is missing; the policy was trained with back, front"):
        load_policy(packed(family, name)).infer(blind, noise)


def test_an_empty_camera_is_neither_asked_for_nor_seen(
    family: str, source: Source, opened: Opened, observations: Observation, noise: Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "three-cameras"
    shutil.copytree(source(family), out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"empty_cameras": 1}))
    actions = open_policy(out).infer(observations, noise)
    assert np.allclose(actions, opened(family).infer(observations, noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, CHUNK, ACTION_DIM), (7, CHUNK, ACTION_DIM + 2), (CHUNK, ACTION_DIM + 2)])
def test_noise_of_another_shape(
    family: str, opened: Opened, observations: Observation, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"noise has shape \[.*\] instead of \[8, 4, 6\]"):
        opened(family).infer(observations, torch.zeros(shape))


def test_noise_that_is_not_finite(family: str, opened: Opened, observations: Observation, noise: Tensor) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        opened(family).infer(observations, noise * float("nan"))


def test_a_state_that_is_not_finite(family: str, opened: Opened, observations: Observation, noise: Tensor) -> None:
    state = observations.state.copy()
    state[0, 0] = np.nan
    with pytest.raises(ValueError, match="state contains NaN or infinity"):
        opened(family).infer(replace(observations, state=state), noise)


# Quantized


@pytest.mark.parametrize("name", RECIPES)
def test_a_new_process_computes_the_same_actions(
    family: str,
    name: str,
    packed: Packed,
    observations: Observation,
    noise: Tensor,
    elsewhere: dict[tuple[str, str], np.ndarray],
) -> None:
    assert np.array_equal(load_policy(packed(family, name)).infer(observations, noise), elsewhere[family, name])


def test_a_recipe_that_keeps_everything_changes_no_bit(
    family: str, packed: Packed, opened: Opened, observations: Observation, noise: Tensor
) -> None:
    policy = load_policy(packed(family, "kept"))
    assert np.array_equal(policy.infer(observations, noise), opened(family).infer(observations, noise))


@pytest.mark.parametrize("name", ["rtn", "omega-int4"])
def test_integers_and_simulation_agree(
    family: str, name: str, packed: Packed, opened: Opened, observations: Observation, noise: Tensor
) -> None:
    integer, simulated = (load_policy(packed(family, name), how) for how in ("integer", "simulated"))
    actions, expected = integer.infer(observations, noise), opened(family).infer(observations, noise)
    assert np.array_equal(actions, simulated.infer(observations, noise))
    assert 0 < np.square(actions - expected).mean() / np.square(expected).mean() < 0.2
    assert integer.resident_bytes() < simulated.resident_bytes()


def test_a_quantized_weight_never_exists_in_floating_point(family: str, packed: Packed) -> None:
    policy = load_policy(packed(family, "omega-int4"))
    linears = {name: m for name, m in policy.module.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(linears) == 2 * 2 * 7
    for linear in linears.values():
        shape, held = linear.weight.shape, [*linear.parameters(), *linear.buffers()]
        held += [x for x in vars(linear).values() if isinstance(x, Tensor)]
        assert not [x for x in held if x.is_floating_point() and x.shape in (shape, shape[::-1])]
    present = [*policy.module.named_parameters(), *policy.module.named_buffers()]
    assert not {f"{name}.weight" for name in linears} & {name for name, _ in present}
    assert not [name for name, tensor in present if tensor.device.type == "meta"]


def test_quantizing_the_vision_tower_works_too(
    family: str, source: Source, opened: Opened, observations: Observation, noise: Tensor, tmp_path: Path
) -> None:
    table = {"weight": {"bits": 8}, "activation": {"bits": 8}}
    rules = [{"part": part, "quantize": table} for part in ("vision", "language", "action")]
    api.quantize(source(family), recipe(*rules), tmp_path / "all")
    policy = load_policy(tmp_path / "all")
    quantized = [module for module in policy.module.modules() if isinstance(module, QuantizedLinear)]
    assert len(quantized) == sum(len(site.linears) for site in policy.sites())
    assert any(linear.bias is not None for linear in quantized)
    expected = opened(family).infer(observations, noise)
    error = np.square(policy.infer(observations, noise) - expected).mean() / np.square(expected).mean()
    assert error < 0.01


# What does not fit


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[ACTION_OUT]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.surprise"] = torch.zeros(1)


def cut(tensors: dict[str, Tensor]) -> None:
    tensors[ACTION_OUT] = tensors[ACTION_OUT][:-1].contiguous()


def poison(tensors: dict[str, Tensor]) -> None:
    tensors[ACTION_OUT][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, rf"model\.safetensors lacks {ACTION_OUT}"),
        (add, r"model\.safetensors holds model\.surprise"),
        (cut, rf"{ACTION_OUT} has shape \[5, \d+\] instead of \[6, \d+\]"),
        (poison, rf"{ACTION_OUT} contains NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(
    family: str, change: Callable[[dict[str, Tensor]], None], message: str, source: Source, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_policy(altered(source(family), tmp_path / "altered", change))


def test_truncated_weights(family: str, source: Source, tmp_path: Path) -> None:
    shutil.copytree(source(family), tmp_path / "cut")
    weights = tmp_path / "cut" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or no safetensors file"):
        open_policy(tmp_path / "cut")


def test_missing_weights(family: str, source: Source, tmp_path: Path) -> None:
    shutil.copytree(source(family), tmp_path / "bare", ignore=shutil.ignore_patterns(WEIGHTS_FILE))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        open_policy(tmp_path / "bare")


def test_a_quantized_checkpoint_for_another_policy(family: str, packed: Packed, opened: Opened) -> None:
    checkpoint = read(packed(family, "rtn"))
    site = checkpoint.sites[0]
    renamed = replace(site, linears=(replace(site.linears[0], name="model.elsewhere.q_proj"),))
    with pytest.raises(CheckpointError, match="does not fit the policy in"):
        type(opened(family)).load(replace(checkpoint, sites=[renamed]), "integer")


def test_a_quantized_checkpoint_for_another_number_of_steps(family: str, packed: Packed, opened: Opened) -> None:
    checkpoint = read(packed(family, "rtn"))
    manifest = replace(checkpoint.manifest, denoising_steps=5)
    with pytest.raises(CheckpointError, match="10 denoising steps, the checkpoint was made for 5"):
        type(opened(family)).load(replace(checkpoint, manifest=manifest), "integer")


def test_kept_tensors_that_do_not_fit(family: str, packed: Packed, opened: Opened) -> None:
    checkpoint = read(packed(family, "rtn"))
    kept = {name: tensor for name, tensor in checkpoint.kept.items() if name != ACTION_OUT}
    with pytest.raises(CheckpointError, match=rf"kept\.safetensors lacks {ACTION_OUT}"):
        type(opened(family)).load(replace(checkpoint, kept=kept), "integer")


def test_a_quantized_checkpoint_of_another_family(family: str, packed: Packed, opened: Opened) -> None:
    other = next(name for name in FAMILIES if name != family)
    with pytest.raises(CheckpointError, match=rf"config\.json is of type '{other}' instead of '{family}'"):
        type(opened(family)).load(read(packed(other, "rtn")), "integer")


@pytest.mark.parametrize("leaf", ["v_proj", "o_proj", "down_proj"])
def test_the_sensitivity_of_single_linears(
    family: str, leaf: str, opened: Callable[[str], LerobotPolicy], observations: Observation
) -> None:
    """Whatever lerobot does to a linear's output afterwards, its gradient is the same alone and among others."""
    policy = opened(family)
    linears = [name for site in policy.sites() if site.part == "action" for name in site.linears]
    probe = ActionProbe(policy, observations[:2], noise_seed=0)
    among_all = probe.gains(linears, directions=1)
    chosen = [name for name in linears if name.endswith(leaf)]
    for name, gain in probe.gains(chosen, directions=1).items():
        assert torch.allclose(gain, among_all[name], rtol=1e-4) and gain.sum() > 0


# What a gate asks


def test_bounds_are_where_the_normalization_ends(family: str, opened: Opened) -> None:
    policy = opened(family)
    bounds = policy.action_bounds()
    if family != "pi05":  # mean and deviation have no ends
        assert bounds is None
        return
    assert bounds is not None
    for bound, end in zip(bounds, (-1.0, 1.0), strict=True):
        assert policy.physical(torch.full((1, 1, ACTION_DIM), end)).flatten().tolist() == bound.tolist()
