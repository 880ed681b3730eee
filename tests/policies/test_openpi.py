"""An openpi checkpoint becomes the lerobot checkpoint of the same weights, with the numbers that openpi has."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0 import PI0Config
from lerobot.policies.pi05 import PI05Config
from safetensors.torch import load_file, save_file

from omega_qvla import api
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies import load_policy, open_policy
from omega_qvla.policies.layouts import is_openpi
from omega_qvla.policies.openpi import CAMERAS, TOKENIZER, module_name, translate
from omega_qvla.policies.paligemma_architecture import ARCHITECTURE_FILE, build
from omega_qvla.policies.stored import WEIGHTS_FILE, StoredTensors
from omega_qvla.policy import Observation
from tiny_policy import CHUNK, INSTRUCTIONS, STATE_DIM, Size, randomize, save, statistics, tokenizer

KINDS = {"pi05": PI05Config, "pi0": PI0Config}
MARKS = {"pi05": ("time_mlp_in.weight",), "pi0": ("action_time_mlp_in.weight", "state_proj.weight")}
PADDED = 8
SIZE = Size(image=224, patch=56)
MODEL = {
    "action_dim": PADDED,
    "action_horizon": CHUNK,
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "precision": "float32",
}

Statistics = dict[str, dict[str, list[float]]]

EXECUTIONS: tuple[Literal["integer", "simulated"], ...] = ("integer", "simulated")

families = pytest.mark.parametrize("family", KINDS)


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A lerobot checkpoint of a family with openpi's cameras and dimensions; read-only."""

    @cache
    def make(family: str) -> Path:
        config = SIZE.config(KINDS[family])
        image = PolicyFeature(FeatureType.VISUAL, (3, SIZE.image, SIZE.image))
        state = config.input_features["observation.state"]
        config.input_features = {f"observation.images.{camera}": image for camera in CAMERAS}
        config.input_features["observation.state"] = state
        config.max_state_dim = config.max_action_dim = PADDED
        torch.manual_seed(0)
        policy = build(config, SIZE.architecture())
        randomize(policy)
        directory = tmp_path_factory.mktemp("lerobot") / family
        save(policy, SIZE, directory)
        return directory

    return make


def write_model(directory: Path, model: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(model, indent=2))


def write_statistics(directory: Path, found: Any, asset: str = "robots/arm") -> None:
    (directory / "assets" / asset).mkdir(parents=True)
    (directory / "assets" / asset / "norm_stats.json").write_text(json.dumps({"norm_stats": found}))


def random_statistics(dimensions: int, padding: int = 0) -> Statistics:
    """As openpi measures them, also for vectors that were padded with zeros before."""
    generator = np.random.default_rng(3)
    found = {}
    for name in ("state", "actions"):
        low, spread = generator.uniform(-2, 2, dimensions), generator.uniform(0.01, 3, dimensions)
        low[1], spread[1] = 0, 3e-4  # a joint that hardly moved: here it matters what openpi adds
        spread[2] = 0  # one that never moved
        values = {"mean": low + spread / 2, "std": spread / 3, "q01": low, "q99": low + spread}
        found[name] = {key: [*value.tolist(), *[0.0] * padding] for key, value in values.items()}
    return found


def small(directory: Path, family: str) -> Path:
    """All that is translated of an openpi checkpoint, with hardly any weights."""
    directory.mkdir()
    write_model(directory, MODEL)
    write_statistics(directory, random_statistics(STATE_DIM))
    save_file({key: torch.ones(1) for key in MARKS[family]}, directory / WEIGHTS_FILE)
    tokenizer().save_pretrained(directory / "tokenizer")
    return directory


def processors(directory: Path) -> tuple[Any, Any]:
    config = PreTrainedConfig.from_pretrained(directory, local_files_only=True)
    named = {"tokenizer_processor": {"tokenizer_name": str(directory / "tokenizer")}}
    return make_pre_post_processors(config, str(directory), preprocessor_overrides=named)


@families
def test_it_acts_as_the_lerobot_checkpoint_of_the_same_weights(
    family: str, lerobot: Callable[[str], Path], tmp_path: Path
) -> None:
    source, openpi, out = lerobot(family), tmp_path / "openpi", tmp_path / "translated"
    openpi.mkdir()
    tensors = {key.removeprefix("model."): tensor for key, tensor in load_file(source / WEIGHTS_FILE).items()}
    save_file(tensors, openpi / WEIGHTS_FILE)
    write_model(openpi, MODEL)
    ours = statistics(PreTrainedConfig.from_pretrained(source, local_files_only=True))
    known = {"state": ours["observation.state"], "actions": ours["action"]}
    unused = {key: [0.5] * STATE_DIM for key in ("mean", "std")}
    write_statistics(
        openpi,
        {name: unused | {key: value.tolist() for key, value in found.items()} for name, found in known.items()},
    )
    shutil.copyfile(source / ARCHITECTURE_FILE, openpi / ARCHITECTURE_FILE)
    shutil.copytree(source / "tokenizer", openpi / "tokenizer")

    translate(openpi, out)
    stored = StoredTensors.open(openpi).renamed(module_name)
    save_file({name: stored.read(name) for name in stored.names()}, out / WEIGHTS_FILE)

    generator = np.random.default_rng(1)
    images = {camera: generator.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8) for camera in CAMERAS}
    state = generator.uniform(-1, 1, (2, STATE_DIM)).astype(np.float32)
    observation = Observation(images, state, INSTRUCTIONS[:2])
    noise = torch.randn(2, CHUNK, PADDED, generator=torch.Generator().manual_seed(2))
    opened = open_policy(openpi)  # which translates it
    assert opened.noise_shape == (CHUNK, PADDED) and opened.execute_steps == CHUNK
    translated, actions, expected = (
        policy.infer(observation, noise) for policy in (open_policy(out), opened, open_policy(source))
    )
    assert actions.shape == (2, CHUNK, STATE_DIM)
    assert np.allclose(actions, expected, rtol=1e-5, atol=1e-5) and np.array_equal(actions, translated)

    api.quantize(openpi, "omega-int4", tmp_path / "packed", calibration=api.CalibrationSet(observation, ("random",)))
    integer, simulated = (
        load_policy(tmp_path / "packed", execution).infer(observation, noise) for execution in EXECUTIONS
    )
    assert np.allclose(integer, simulated, rtol=1e-4, atol=1e-4)
    assert np.abs(integer - expected).max() < np.abs(expected).max()


@families
def test_a_camera_that_the_robot_lacks_is_masked(family: str, lerobot: Callable[[str], Path], tmp_path: Path) -> None:
    source, openpi = lerobot(family), small(tmp_path / "openpi", family)
    tensors = {key.removeprefix("model."): tensor for key, tensor in load_file(source / WEIGHTS_FILE).items()}
    save_file(tensors, openpi / WEIGHTS_FILE)
    shutil.copyfile(source / ARCHITECTURE_FILE, openpi / ARCHITECTURE_FILE)
    generator = np.random.default_rng(1)
    images = {camera: generator.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8) for camera in CAMERAS}
    state = np.zeros((1, STATE_DIM), np.float32)
    two = Observation({camera: images[camera] for camera in CAMERAS[:2]}, state, INSTRUCTIONS[:1])
    three = Observation(images, state, INSTRUCTIONS[:1])
    noise = torch.randn(1, CHUNK, PADDED, generator=torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match="camera 'right_wrist_0_rgb' is missing"):
        open_policy(openpi).infer(two, noise)
    all_three = open_policy(openpi).infer(three, noise)

    write_model(openpi, MODEL | {"cameras": list(CAMERAS[:2])})
    policy = open_policy(openpi)
    assert list(policy.interface().cameras) == list(CAMERAS[:2])
    actions = policy.infer(two, noise)
    assert np.array_equal(policy.infer(three, noise), actions)  # it does not look at what it does not know
    assert not np.allclose(actions, all_three)
    api.quantize(openpi, "omega-int4", tmp_path / "packed", calibration=api.CalibrationSet(two, ("random",)))
    assert np.isfinite(load_policy(tmp_path / "packed", "integer").infer(two, noise)).all()


@families
@pytest.mark.parametrize("padding", [0, PADDED - STATE_DIM])
def test_states_and_actions_are_normalized_as_in_openpi(family: str, padding: int, tmp_path: Path) -> None:
    source, out = small(tmp_path / "openpi", family), tmp_path / "out"
    shutil.rmtree(source / "assets")
    write_statistics(source, random_statistics(STATE_DIM, padding))
    translate(source, out)
    before, after = processors(out)
    found = {
        name: {key: np.array(value)[:STATE_DIM] for key, value in values.items()}
        for name, values in random_statistics(STATE_DIM).items()
    }
    generator = np.random.default_rng(4)
    state, normalized = generator.normal(size=(3, STATE_DIM)), generator.normal(size=(3, CHUNK, STATE_DIM))
    state[:, 1], state[:, 2] = (0, 1e-4, 3e-4), found["state"]["mean"][2]

    if family == "pi0":
        expected_state = (state - found["state"]["mean"]) / (found["state"]["std"] + 1e-6)
        expected_actions = normalized * (found["actions"]["std"] + 1e-6) + found["actions"]["mean"]
    else:
        low, spread = found["state"]["q01"], found["state"]["q99"] - found["state"]["q01"] + 1e-6
        expected_state = (state - low) / spread * 2 - 1
        low, spread = found["actions"]["q01"], found["actions"]["q99"] - found["actions"]["q01"] + 1e-6
        expected_actions = (normalized + 1) / 2 * spread + low

    batch = before({"observation.state": torch.tensor(state, dtype=torch.float32), "task": list(INSTRUCTIONS[:3])})
    assert np.allclose(batch["observation.state"], expected_state, rtol=1e-3, atol=1e-4)
    actions = after(torch.tensor(normalized, dtype=torch.float32))
    assert np.allclose(actions, expected_actions, rtol=1e-5, atol=4e-7)


@families
def test_what_is_written(family: str, tmp_path: Path) -> None:
    source, out = small(tmp_path / "openpi", family), tmp_path / "out"
    write_model(source, MODEL | {"precision": "bfloat16", "action_horizon": 10})
    translate(source, out)
    config = PreTrainedConfig.from_pretrained(out, local_files_only=True)
    assert config.type == family and config.dtype == "bfloat16"
    assert config.chunk_size == config.n_action_steps == 10
    assert config.max_state_dim == config.max_action_dim == PADDED
    assert config.tokenizer_max_length == {"pi05": 200, "pi0": 48}[family]
    assert list(config.image_features) == [f"observation.images.{camera}" for camera in CAMERAS]
    assert config.robot_state_feature.shape == config.action_feature.shape == (STATE_DIM,)
    assert (out / "tokenizer" / "tokenizer.json").is_file() and not (out / ARCHITECTURE_FILE).exists()
    steps = json.loads((out / "policy_preprocessor.json").read_text())["steps"]
    settings = [step["config"] for step in steps]
    assert [found["tokenizer_name"] for found in settings if "tokenizer_name" in found] == [TOKENIZER]
    assert [found["enabled"] for found in settings if "enabled" in found] == [False]  # actions relative to the state


@pytest.mark.parametrize("in_prompt", [True, False])
def test_whether_the_state_is_in_the_prompt(in_prompt: bool, tmp_path: Path) -> None:
    source, out = small(tmp_path / "openpi", "pi05"), tmp_path / "out"
    if not in_prompt:
        write_model(source, MODEL | {"discrete_state_input": False})
    translate(source, out)
    before, _ = processors(out)
    tokens = before({"observation.state": torch.zeros(1, STATE_DIM), "task": ["open the door"]})
    words = tokenizer().convert_ids_to_tokens(tokens["observation.language.tokens"][0])
    said = [word for word in words if word != "<pad>"]
    assert said[-3:] == ["open", "the", "door"] if not in_prompt else "State" in said


def test_what_is_openpi() -> None:
    assert is_openpi(MODEL) and is_openpi(MODEL | {"precision": "float16"})
    assert not is_openpi({"type": "pi05", "chunk_size": 50}) and not is_openpi(MODEL | {"type": "pi0"})
    assert not is_openpi({"model_type": "gr00t_n1_5"})
    assert module_name("state_proj.weight") == "model.state_proj.weight"


def test_one_of_several_statistics_is_chosen(tmp_path: Path) -> None:
    source = small(tmp_path / "openpi", "pi0")
    write_statistics(source, random_statistics(STATE_DIM + 2), "trossen")
    with pytest.raises(
        CheckpointError, match=r"assets holds the statistics of robots/arm, trossen; leave only those"
    ):
        translate(source, tmp_path / "out")
    translate(source, tmp_path / "out", "trossen")
    config = PreTrainedConfig.from_pretrained(tmp_path / "out", local_files_only=True)
    assert config.action_feature.shape == (STATE_DIM + 2,)
    with pytest.raises(CheckpointError, match=r"assets holds no statistics of leg, but of robots/arm, trossen"):
        translate(source, tmp_path / "other", "leg")


def model(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: write_model(directory, MODEL | changes)


def measured(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        found = random_statistics(STATE_DIM)
        change(found)
        shutil.rmtree(directory / "assets")
        write_statistics(directory, found)

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda d: write_model(d, {"precision": "float32"}), r"config\.json: action_dim: Field required"),
        (model(cameras=["top"]), r"config\.json: cameras\.0: Input should be 'base_0_rgb', "),
        (model(cameras=[]), r"config\.json: cameras: List should have at least 1 item"),
        (model(precision="float16"), r"config\.json: precision: Input should be 'float32' or 'bfloat16'"),
        (model(paligemma_variant="gemma_2b_lora"), r"config\.json: paligemma_variant: Input should be 'gemma_2b'"),
        (model(action_expert_variant="dummy"), r"config\.json: action_expert_variant: Input should be"),
        (model(action_dim="32"), r"config\.json: action_dim: Input should be a valid integer"),
        (model(action_horizon=0), r"config\.json: action_horizon: Input should be greater than 0"),
        (model(image_keys=["base_0_rgb"]), r"config\.json: image_keys: Unexpected"),
        (lambda d: shutil.rmtree(d / "assets"), r"assets holds no norm_stats\.json; copy the assets"),
        (measured(lambda s: s.pop("actions")), r"norm_stats\.json: norm_stats\.actions: Field required"),
        (measured(lambda s: s.update(gripper=s["state"])), r"norm_stats\.json: norm_stats\.gripper: Unexpected"),
        (measured(lambda s: s["state"].pop("q99")), r"norm_stats\.json: state lacks q01 and q99"),
        (measured(lambda s: s["state"]["q01"].pop()), r"norm_stats\.state: .*must have the same length"),
        (measured(lambda s: s["state"].update(mean=[])), r"norm_stats\.state\.mean: List should have at least 1"),
        (
            measured(lambda s: s["actions"]["std"].__setitem__(0, -1)),
            r"norm_stats\.actions\.std\.0: .* or equal to 0",
        ),
        (
            measured(lambda s: s["actions"]["q01"].__setitem__(2, float("nan"))),
            r"norm_stats\.actions\.q01\.2: Input should be a finite number",
        ),
        (
            measured(lambda s: s.update(random_statistics(PADDED + 1))),
            r"norm_stats\.json: state has 9 dimensions, the model 8",
        ),
        (lambda d: (d / WEIGHTS_FILE).unlink(), r"model\.safetensors is missing"),
        (
            lambda d: save_file({"state_proj.weight": torch.ones(1)}, d / WEIGHTS_FILE),
            r"model\.safetensors is of neither a pi0\.5, which has time_mlp_in\.weight, nor a pi0",
        ),
    ],
)
def test_what_is_refused(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    source = small(tmp_path / "openpi", "pi05")
    change(source)
    with pytest.raises(CheckpointError) as caught:
        translate(source, tmp_path / "out")
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["openpi"]


def test_an_existing_directory_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out already exists"):
        translate(small(tmp_path / "openpi", "pi0"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
