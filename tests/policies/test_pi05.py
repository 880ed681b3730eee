"""pi0.5 as a policy: laws 4, 5 and 7, and how it refuses what does not fit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omega_qvla import api
from omega_qvla.pack.checkpoint import read
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies import load_policy, open_or_load, open_policy
from omega_qvla.policies.pi05 import PI05, WEIGHTS_FILE
from omega_qvla.policy import Observation
from omega_qvla.runtime import QuantizedLinear
from omega_qvla.spec import read_recipe, recipe_names
from tiny_policy import ACTION_DIM, CHUNK, random_noise
from toy_policy import recipe

Quantized = Callable[[str], Path]

PARTS = ("vision", "language", "action")

OTHER_PROCESS = """
import sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from omega_qvla import load
from omega_qvla.policy import Observation
file, *directories = sys.argv[1:]
data = np.load(file)
images = {name: data[name] for name in ("back", "front")}
observation = Observation(images, data["state"], tuple(data["instructions"].tolist()))
actions = [load(Path(d)).infer(observation, torch.from_numpy(data["noise"])) for d in directories]
np.save(file + ".actions.npy", np.stack(actions))
"""


@pytest.fixture(scope="module")
def all_kept(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a recipe that keeps everything in floating point."""
    out = tmp_path_factory.mktemp("kept") / "kept"
    rules = [{"part": part, "keep": "to compare"} for part in PARTS]
    manifest = api.quantize(checkpoint, recipe(*rules), out)
    assert not manifest.plan.sites and manifest.calibration is None
    return out


@pytest.fixture(scope="module")
def elsewhere(
    quantized: Quantized,
    all_kept: Path,
    observations: Observation,
    noise: Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, np.ndarray]:
    """Actions of the quantized policies as a new process loads and computes them."""
    directories = {name: quantized(name) for name in recipe_names()} | {"kept": all_kept}
    file = tmp_path_factory.mktemp("elsewhere") / "data.npz"
    data: dict[str, Any] = {"state": observations.state, "noise": noise.numpy(), **observations.images}
    np.savez(file, instructions=np.array(observations.instructions), **data)
    arguments = [sys.executable, "-c", OTHER_PROCESS, str(file), *map(str, directories.values())]
    subprocess.run(arguments, check=True, cwd=file.parent)
    return dict(zip(directories, np.load(f"{file}.actions.npy"), strict=True))


def linears_of(policy: PI05) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in policy.module.named_modules() if isinstance(m, QuantizedLinear)}


def altered(checkpoint: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a floating-point checkpoint with other tensors."""
    shutil.copytree(checkpoint, out)
    tensors = load_file(out / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    return out


def test_floating_point_is_what_lerobot_computes(floating: PI05, observations: Observation) -> None:
    """The adapter's input and output, against lerobot's processors and model called one by one."""
    noise = random_noise(8, 2)
    batch = {f"observation.images.{name}": torch.from_numpy(x) for name, x in observations.images.items()}
    batch = {key: x.permute(0, 3, 1, 2).float() / 255 for key, x in batch.items()}
    batch |= {"observation.state": torch.from_numpy(observations.state)}
    prepared = floating._preprocessor(batch | {"task": list(observations.instructions)})
    chunk = floating.module.predict_action_chunk(prepared, noise=noise)
    assert np.array_equal(floating.infer(observations, noise), floating._postprocessor(chunk).numpy())


def test_actions(floating: PI05, observations: Observation, noise: Tensor) -> None:
    actions = floating.infer(observations, noise)
    assert actions.shape == (8, CHUNK, ACTION_DIM) and actions.dtype == np.float32
    assert np.isfinite(actions).all() and actions.std() > 0.1
    assert np.array_equal(actions, floating.infer(observations, noise))
    assert not np.allclose(actions, floating.infer(observations, noise + 0.1))


def test_every_input_matters(floating: PI05, observations: Observation, noise: Tensor) -> None:
    actions = floating.infer(observations, noise)
    dark = {name: image * (name != "front") for name, image in observations.images.items()}
    changes = [
        replace(observations, images=dark),
        replace(observations, state=-observations.state),
        replace(observations, instructions=("push the puck",) * 8),
    ]
    for changed in changes:
        assert not np.allclose(actions, floating.infer(changed, noise), atol=1e-4)


@pytest.mark.parametrize("name", recipe_names())
def test_a_new_process_computes_the_same_actions(
    name: str,
    quantized: Quantized,
    observations: Observation,
    noise: Tensor,
    elsewhere: dict[str, np.ndarray],
) -> None:
    assert np.array_equal(load_policy(quantized(name)).infer(observations, noise), elsewhere[name])


@pytest.mark.parametrize("name", recipe_names())
def test_integers_and_simulation_agree(
    name: str, quantized: Quantized, observations: Observation, noise: Tensor
) -> None:
    integer, simulated = (load_policy(quantized(name), how) for how in ("integer", "simulated"))
    assert np.array_equal(integer.infer(observations, noise), simulated.infer(observations, noise))
    best = read_recipe(name).execution
    assert simulated.execution == ("simulated" if best == "integer" else best)
    assert integer.execution == best
    assert "integer" not in {x.execution for x in linears_of(simulated).values()}


@pytest.mark.parametrize("name", recipe_names())
def test_quantized_actions_are_near_those_in_floating_point(
    name: str, quantized: Quantized, floating: PI05, observations: Observation, noise: Tensor
) -> None:
    expected = floating.infer(observations, noise)
    actions = load_policy(quantized(name)).infer(observations, noise)
    relative = np.square(actions - expected).mean() / np.square(expected).mean()
    assert 0 < relative < 0.2


def test_a_recipe_that_keeps_everything_changes_no_bit(
    all_kept: Path,
    floating: PI05,
    observations: Observation,
    noise: Tensor,
    elsewhere: dict[str, np.ndarray],
) -> None:
    expected = floating.infer(observations, noise)
    assert np.array_equal(load_policy(all_kept).infer(observations, noise), expected)
    assert np.array_equal(elsewhere["kept"], expected)


def test_quantizing_the_vision_tower_works_too(
    checkpoint: Path, observations: Observation, noise: Tensor, tmp_path: Path
) -> None:
    rules = [{"part": part, "quantize": {"weight": {"bits": 8}, "activation": {"bits": 8}}} for part in PARTS]
    api.quantize(checkpoint, recipe(*rules), tmp_path / "all")
    policy = load_policy(tmp_path / "all")
    assert any(linear.bias is not None for linear in linears_of(policy).values())
    expected = open_policy(checkpoint).infer(observations, noise)
    error = np.square(policy.infer(observations, noise) - expected).mean() / np.square(expected).mean()
    assert error < 0.01


def test_a_quantized_weight_never_exists_in_floating_point(quantized: Quantized) -> None:
    policy = load_policy(quantized("omega-int4"))
    linears = linears_of(policy)
    assert len(linears) == 2 * 2 * 7
    for linear in linears.values():
        shape, held = linear.weight.shape, [*linear.parameters(), *linear.buffers()]
        held += [x for x in vars(linear).values() if isinstance(x, Tensor)]
        assert not [x for x in held if x.is_floating_point() and x.shape in (shape, shape[::-1])]
    names = {f"{name}.weight" for name in linears}
    present = [*policy.module.named_parameters(), *policy.module.named_buffers()]
    assert not names & {name for name, _ in present}
    assert not [name for name, tensor in present if tensor.device.type == "meta"]


def test_a_quantized_policy_is_smaller_in_memory(quantized: Quantized, floating: PI05) -> None:
    integer, simulated = (load_policy(quantized("rtn"), how) for how in ("integer", "simulated"))
    assert integer.resident_bytes() < simulated.resident_bytes()
    assert integer.resident_bytes() < floating.resident_bytes()


@pytest.mark.parametrize("name", ["full precision", "omega-qvla", "omega-int4"])
def test_denoising_ends_in_the_actions(
    name: str, quantized: Quantized, floating: PI05, observations: Observation, noise: Tensor
) -> None:
    policy = floating if name == "full precision" else load_policy(quantized(name))
    chunks = policy.denoise(observations[:2], noise[:2])
    assert chunks.shape == (10, 2, CHUNK, ACTION_DIM + 2)
    scales = torch.tensor([0.5, 1.0, 2.0, 4.0])  # of the tiny policy's unnormalization
    actions = torch.from_numpy(policy.infer(observations[:2], noise[:2]))
    assert torch.allclose(chunks[-1, ..., :ACTION_DIM] * scales, actions, rtol=1e-4, atol=1e-5)
    assert (chunks[1:] - chunks[:-1]).flatten(1).norm(dim=1).min() > 0


def test_lerobots_loop_passes_the_steps_in_order(checkpoint: Path, observations: Observation, noise: Tensor) -> None:
    policy, seen = open_policy(checkpoint), []
    layer = policy.module.get_submodule(policy.sites()[-1].linears[0])
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(policy.step.current))
    for _ in range(2):
        seen.clear()
        policy.infer(observations[:1], noise[:1])
        assert seen == list(range(10))
        assert not policy.step.running


def test_an_exception_in_the_loop_ends_the_step(checkpoint: Path, observations: Observation, noise: Tensor) -> None:
    policy = open_policy(checkpoint)

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


@pytest.mark.parametrize("name", ["full precision", "omega-int4"])
def test_a_missing_camera(
    name: str, quantized: Quantized, floating: PI05, observations: Observation, noise: Tensor
) -> None:
    policy = floating if name == "full precision" else load_policy(quantized(name))
    blind = replace(observations, images={"back": observations.images["back"]})
    with pytest.raises(ValueError, match="camera 'front' is missing; the policy was trained with back, front"):
        policy.infer(blind, noise)


@pytest.mark.parametrize("shape", [(8, CHUNK, ACTION_DIM), (7, CHUNK, ACTION_DIM + 2), (CHUNK, ACTION_DIM + 2)])
def test_noise_of_another_shape(floating: PI05, observations: Observation, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"noise has shape \[.*\] instead of \[8, 4, 6\]"):
        floating.infer(observations, torch.zeros(shape))


def test_noise_that_is_not_finite(floating: PI05, observations: Observation, noise: Tensor) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        floating.infer(observations, noise * float("nan"))


def test_a_state_that_is_not_finite(floating: PI05, observations: Observation, noise: Tensor) -> None:
    state = observations.state.copy()
    state[0, 0] = np.nan
    with pytest.raises(ValueError, match="state contains NaN or infinity"):
        floating.infer(replace(observations, state=state), noise)


def test_both_kinds_of_directory_open(checkpoint: Path, quantized: Quantized) -> None:
    assert open_or_load(checkpoint).label == "full precision"
    assert open_or_load(quantized("rtn")).label == "rtn"


def test_the_first_dense_of_every_norm_matters(floating: PI05) -> None:
    """Otherwise the denoising time would be invisible and every step alike."""
    dense = [m for name, m in floating.module.named_modules() if name.endswith("norm.dense")]
    assert dense and all(m.weight.abs().max() > 0 for m in dense)


ACTION_OUT = "model.action_out_proj.weight"


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
        (cut, rf"{ACTION_OUT} has shape \[5, 128\] instead of \[6, 128\]"),
        (poison, rf"{ACTION_OUT} contains NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], None], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_policy(altered(checkpoint, tmp_path / "altered", change))


def test_truncated_weights(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "cut")
    weights = tmp_path / "cut" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or no safetensors file"):
        open_policy(tmp_path / "cut")


def test_missing_weights(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns(WEIGHTS_FILE))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        open_policy(tmp_path / "bare")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"holds no lerobot checkpoint: config\.json is missing"),
        ("{", r"config\.json is not JSON"),
        ('{"type": "act"}', r"config\.json is of a policy of type 'act'; supported: pi05"),
        ("{}", r"config\.json is of a policy of type None; supported: pi05"),
        ("[]", r"config\.json is of a policy of type None; supported: pi05"),
    ],
)
def test_directories_of_something_else(config: str | None, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        open_policy(tmp_path)


def test_an_architecture_file_of_another_form(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "other")
    (tmp_path / "other" / "architecture.json").write_text('{"vision": {}}')
    with pytest.raises(ValueError, match=r"architecture\.json does not describe a pi0\.5 architecture"):
        open_policy(tmp_path / "other")


def test_a_quantized_checkpoint_for_another_policy(quantized: Quantized) -> None:
    checkpoint = read(quantized("rtn"))
    site = checkpoint.sites[0]
    renamed = replace(site, linears=(replace(site.linears[0], name="model.elsewhere.q_proj"),))
    with pytest.raises(CheckpointError, match="does not fit the policy in"):
        PI05.load(replace(checkpoint, sites=[renamed]), "integer")


def test_a_quantized_checkpoint_for_another_number_of_steps(quantized: Quantized) -> None:
    checkpoint = read(quantized("rtn"))
    manifest = replace(checkpoint.manifest, denoising_steps=5)
    with pytest.raises(CheckpointError, match="10 denoising steps, the checkpoint was made for 5"):
        PI05.load(replace(checkpoint, manifest=manifest), "integer")


def test_kept_tensors_that_do_not_fit(quantized: Quantized) -> None:
    checkpoint = read(quantized("rtn"))
    kept = {name: tensor for name, tensor in checkpoint.kept.items() if name != ACTION_OUT}
    with pytest.raises(CheckpointError, match=rf"kept\.safetensors lacks {ACTION_OUT}"):
        PI05.load(replace(checkpoint, kept=kept), "integer")


def test_a_layer_that_the_adapter_does_not_know(floating: PI05) -> None:
    with pytest.raises(KeyError, match="does not know the linear layer"):
        floating.kept_because("model.new_projection")
