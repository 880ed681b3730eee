"""A quantized checkpoint directory is a policy directory of lerobot, and acts there as it does here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delivering import delivered
from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class, make_pre_post_processors
from lerobot.rollout.inference.sync import SyncInferenceEngine
from torch import Tensor

from omega_qvla import api
from omega_qvla.evaluation.seeds import episode_key, episode_noise
from omega_qvla.lerobot_plugin.configuration_omega_qvla import OmegaQVLAConfig
from omega_qvla.lerobot_plugin.episode_key import BATCH_KEY, from_batch, to_observation
from omega_qvla.lerobot_plugin.modeling_omega_qvla import OmegaQVLAPolicy
from omega_qvla.pack.checkpoint import read_manifest
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies import load_policy, open_policy
from omega_qvla.policy import Observation
from tiny_policy import ACTION_DIM, CAMERAS, CHUNK, FAMILIES, save_family

GOLDEN = Path(__file__).parents[1] / "golden" / "omega-int4"
NOISE_SHAPE = (CHUNK, ACTION_DIM + 2)


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint of each family."""
    scratch = tmp_path_factory.mktemp("lerobot")
    save_family(request.param, scratch / "source")
    api.quantize(scratch / "source", "rtn", scratch / "quantized")
    return scratch / "quantized"


@pytest.fixture
def tiny(quantized: Callable[[str], Path]) -> OmegaQVLAPolicy:
    return OmegaQVLAPolicy.from_pretrained(quantized("omega-int4"))


def processors(directory: Path, rename_map: dict[str, str] | None = None) -> Any:
    """With all that lerobot's programs set: eval and rollout before the policy, the policy server after it too."""
    to_cpu = {"device_processor": {"device": "cpu"}}
    return make_pre_post_processors(
        PreTrainedConfig.from_pretrained(directory),
        pretrained_path=str(directory),
        preprocessor_overrides={**to_cpu, "rename_observations_processor": {"rename_map": rename_map or {}}},
        postprocessor_overrides=to_cpu,
    )


def test_lerobot_opens_the_directory(directory: Path, observations: Observation, noise: Tensor) -> None:
    """The configuration, the class that lerobot finds for it, and both pipelines: the actions are those of `load`."""
    config = PreTrainedConfig.from_pretrained(directory)
    policy = get_policy_class(config.type).from_pretrained(directory, config=config)
    before, after = processors(directory)
    loaded = load_policy(directory)
    assert config.n_action_steps == loaded.execute_steps
    chunk = after(policy.predict_action_chunk(before(delivered(observations)), noise=noise))
    assert np.array_equal(chunk.numpy(), loaded.infer(observations, noise))


def test_the_configuration_says_what_the_policy_takes_and_how_it_is_quantized(directory: Path) -> None:
    config = PreTrainedConfig.from_pretrained(directory)
    assert set(config.image_features) == {f"observation.images.{camera}" for camera in CAMERAS}
    assert config.robot_state_feature.shape == config.action_feature.shape == (ACTION_DIM,)
    says, plan = config.quantization_config, read_manifest(directory).plan
    named = [name for group in says["config_groups"].values() for name in group["targets"]]
    assert sorted([*named, *says["ignore"]]) == sorted(linear.name for linear in plan.linears)
    assert (says["quant_method"], says["bits"], says["recipe"]) == ("omega-qvla", 4, "rtn")


def test_what_lerobot_reads_is_in_the_manifest(directory: Path, tmp_path: Path) -> None:
    added = {"config.json", "policy_preprocessor.json", "policy_postprocessor.json"}
    assert added < read_manifest(directory).files.keys()
    for name in added:
        damaged = tmp_path / name
        shutil.copytree(directory, damaged)
        (damaged / name).write_text((damaged / name).read_text().replace("cpu", "CPU"))
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            load_policy(damaged)


def test_cameras_are_renamed(quantized: Callable[[str], Path], observations: Observation, noise: Tensor) -> None:
    directory = quantized("omega-int4")
    policy, (before, _) = (
        OmegaQVLAPolicy.from_pretrained(directory),
        processors(directory, {"observation.images.top": "observation.images.back"}),
    )
    batch = delivered(observations)
    expected = policy.predict_action_chunk(batch, noise=noise)
    batch["observation.images.top"] = batch.pop("observation.images.back")
    with pytest.raises(ValueError, match="camera 'back' is missing"):
        policy.predict_action_chunk(batch, noise=noise)
    assert torch.equal(policy.predict_action_chunk(before(batch), noise=noise), expected)


def test_one_observation_of_a_robot(tiny: OmegaQVLAPolicy, observations: Observation) -> None:
    """It comes without a batch, its task as a single sentence."""
    before, after = make_pre_post_processors(tiny.config)
    batch = {key: value[0] for key, value in delivered(observations).items()}
    assert after(tiny.select_action(before(batch))).shape == (1, ACTION_DIM)


def test_it_runs_a_robot_as_lerobots_rollout_does(tiny: OmegaQVLAPolicy, observations: Observation) -> None:
    before, after = make_pre_post_processors(tiny.config)
    joints = [f"joint_{i}" for i in range(ACTION_DIM)]
    engine = SyncInferenceEngine(
        tiny, before, after, {"action": {"names": joints}}, joints, observations.instructions[0], "cpu", "arm"
    )
    frame = {f"observation.images.{camera}": image[0] for camera, image in observations.images.items()}
    torch.manual_seed(7)
    action = engine.get_action(frame | {"observation.state": observations.state[0]})
    torch.manual_seed(7)
    noise = torch.normal(0.0, 1.0, (1, *NOISE_SHAPE))
    assert action is not None
    assert np.array_equal(action.numpy(), tiny.policy.infer(observations[:1], noise)[0, 0])


# The queue and its noise


def test_a_chunk_is_executed_before_the_next_inference(tiny: OmegaQVLAPolicy, observations: Observation) -> None:
    batch = delivered(observations)
    torch.manual_seed(3)
    chunks = [tiny.predict_action_chunk(batch) for _ in range(2)]
    torch.manual_seed(3)
    actions = [tiny.select_action(batch) for _ in range(3)]
    for action, expected in zip(actions, (chunks[0][:, 0], chunks[0][:, 1], chunks[1][:, 0]), strict=True):
        assert torch.equal(action, expected)
    tiny.reset()
    torch.manual_seed(3)
    assert torch.equal(tiny.select_action(batch), actions[0])


def test_noise_is_torchs_unless_the_environment_names_the_episode(
    tiny: OmegaQVLAPolicy, observations: Observation
) -> None:
    batch = delivered(observations)
    torch.manual_seed(5)
    drawn = torch.normal(0.0, 1.0, (len(observations), *NOISE_SHAPE))
    torch.manual_seed(5)
    assert np.array_equal(tiny.predict_action_chunk(batch).numpy(), tiny.policy.infer(observations, drawn))
    seeds = range(99_992, 100_000)
    batch[BATCH_KEY] = torch.from_numpy(np.stack([to_observation("push-v3", seed) for seed in seeds]))
    tiny.reset()
    for inference in range(2):
        named = np.stack([episode_noise("push-v3", seed, inference, NOISE_SHAPE) for seed in seeds])
        expected = tiny.policy.infer(observations, torch.from_numpy(named))
        assert np.array_equal(tiny.predict_action_chunk(batch).numpy(), expected)


def test_an_episodes_key_survives_float32() -> None:
    names = [(f"task-{i}", i * 997) for i in range(100)]
    keys = torch.from_numpy(np.stack([to_observation(*name) for name in names])).float()
    assert from_batch(keys) == [episode_key(*name) for name in names]
    for wrong in (0.5, -1.0, float("nan"), 2.0**24):
        with pytest.raises(ValueError, match="instead of its seed and task"):
            from_batch(torch.tensor([[1.0, 2.0, wrong]]))


# Other ways to open a policy


def test_any_directory_can_be_named_as_checkpoint(checkpoint: Path, observations: Observation, noise: Tensor) -> None:
    """In floating point, and quantized before lerobot could read such directories."""
    policy = OmegaQVLAPolicy(OmegaQVLAConfig(checkpoint=str(checkpoint)))
    actions = policy.predict_action_chunk(delivered(observations), noise=noise)
    assert np.array_equal(actions.numpy(), open_policy(checkpoint).infer(observations, noise))
    assert not (GOLDEN / "config.json").exists()
    assert OmegaQVLAPolicy(OmegaQVLAConfig(checkpoint=str(GOLDEN))).policy.label == "omega-int4"


def test_what_can_be_said_on_the_command_line(quantized: Callable[[str], Path]) -> None:
    options = ["--execution=simulated", "--n_action_steps=3"]
    directory = quantized("omega-int4")
    config = PreTrainedConfig.from_pretrained(directory, cli_overrides=options)
    policy = OmegaQVLAPolicy.from_pretrained(directory, config=config)
    assert (policy.policy.execution, policy._steps) == ("simulated", 3)


# What is refused


def test_nothing_is_opened_by_guessing(checkpoint: Path, quantized: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory someone/policy"):
        OmegaQVLAPolicy.from_pretrained("someone/policy")
    with pytest.raises(ValueError, match="name one with --policy"):
        OmegaQVLAPolicy(OmegaQVLAConfig())
    with pytest.raises(ValueError, match="of lerobot's type 'pi05'; let lerobot open it"):
        OmegaQVLAPolicy.from_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match="is quantized already"):
        api.quantize(quantized("omega-int4"), "rtn", tmp_path / "twice")


def test_it_says_where_it_runs(tiny: OmegaQVLAPolicy) -> None:
    assert tiny.to("cpu") is tiny
    for ask in (lambda: tiny.to("cuda"), lambda: OmegaQVLAConfig(device="cuda")):
        with pytest.raises(ValueError, match="runs on the CPU, not on cuda"):
            ask()


def test_it_is_not_trained_and_not_saved_again(tiny: OmegaQVLAPolicy, tmp_path: Path) -> None:
    for train in (lambda: tiny.forward({}), tiny.get_optim_params, tiny.config.get_optimizer_preset):
        with pytest.raises(NotImplementedError, match="cannot be trained"):
            train()
    with pytest.raises(NotImplementedError, match="copy the directory"):
        tiny.save_pretrained(tmp_path)


def test_what_does_not_fit_is_named(
    tiny: OmegaQVLAPolicy, quantized: Callable[[str], Path], observations: Observation
) -> None:
    batch = delivered(observations)
    camera = "observation.images.back"
    for change, message in (
        ({camera: batch[camera] * 255}, "back has values from 0.0 to 255.0 instead of 0 to 1"),
        ({camera: batch[camera] * torch.nan}, "back has values from nan"),
        ({"task": "reach"}, "has 'reach' as task instead of 8 sentences"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.predict_action_chunk(batch | change)
    del batch["observation.state"]
    with pytest.raises(ValueError, match=r"has no observation\.state"):
        tiny.predict_action_chunk(batch)
    config = PreTrainedConfig.from_pretrained(quantized("omega-int4"), cli_overrides=["--n_action_steps=5"])
    with pytest.raises(ValueError, match="n_action_steps is 5, but a chunk has 4 actions"):
        OmegaQVLAPolicy.from_pretrained(quantized("omega-int4"), config=config).select_action(delivered(observations))
    config.output_features["action"].shape = (7,)
    with pytest.raises(ValueError, match=r"gives actions of 4 numbers, the robot takes \[7\]"):
        OmegaQVLAPolicy.from_pretrained(quantized("omega-int4"), config=config)


def test_a_family_that_lerobot_does_not_know_declares_nothing(quantized: Callable[[str], Path]) -> None:
    from omega_qvla.policies.lerobot_directory import lerobot_files

    policy, plan = load_policy(quantized("omega-int4")), read_manifest(quantized("omega-int4")).plan
    assert json.loads(lerobot_files(policy, plan)["config.json"])["type"] == "omega_qvla"
    policy.family = "groot_n15"
    assert lerobot_files(policy, plan) == {}
