"""GR00T N1.5 as a policy: both layouts of its checkpoints, what reaches the model, and what becomes of it when it is
quantized."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from omega_qvla import api
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies import load_policy, open_policy
from omega_qvla.policies.float_products import float_products
from omega_qvla.policies.groot_n15 import RELEASED, Architecture, GrootN15
from omega_qvla.policies.groot_n15.normalization import Mode, Normalization
from omega_qvla.policies.groot_n15.policy import GrootN15Policy
from omega_qvla.policies.groot_n15.processing import Processing, read_architecture
from omega_qvla.policies.layouts import recognized
from omega_qvla.policies.stored import INDEX_FILE, WEIGHTS_FILE
from omega_qvla.policy import Observation, PreviousChunk
from omega_qvla.quantization import build_plan
from omega_qvla.runtime import QuantizedLinear
from omega_qvla.spec import Recipe, read_recipe, with_settings
from tiny_policy import ACTION_DIM, CAMERAS, CHUNK, SCALES, STATE_DIM, random_noise, random_observations, tokenizer

IMAGE, PATCHES, STEPS, EMBODIMENT, WIDTH = 28, 4, 3, 2, 64
PADDED = ACTION_DIM + 2
SPECIAL = {"image_token": "<IMG_CONTEXT>", "start_token": "<img>", "end_token": "</img>", "turn_token": "<|im_end|>"}
TEMPLATE = (
    "{% set seen = namespace(count=0) %}{% for message in messages %}{{ message.role }} "
    "{% for part in message.content %}{% if part.type == 'image' %}{% set seen.count = seen.count + 1 %}"
    "<image-{{ seen.count }}>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)
ATTENTION = {"num_attention_heads": 4, "attention_head_dim": 16, "positional_embeddings": None}
HEAD: dict[str, Any] = {
    "action_dim": PADDED,
    "action_horizon": CHUNK,
    "max_state_dim": STATE_DIM + 2,
    "hidden_size": 32,
    "input_embedding_dim": WIDTH,
    "backbone_embedding_dim": WIDTH,
    "num_inference_timesteps": STEPS,
    "max_num_embodiments": 3,
    "max_seq_len": 8,
    "num_target_vision_tokens": 2,
    "diffusion_model_cfg": ATTENTION
    | {"num_layers": 2, "output_dim": 32, "cross_attention_dim": WIDTH, "interleave_self_attention": True}
    | {"norm_type": "ada_norm"},
    "vl_self_attention_cfg": ATTENTION | {"num_layers": 1},
}
CONFIG: dict[str, Any] = {
    "model_type": "gr00t_n1_5",
    "action_dim": PADDED,
    "action_horizon": CHUNK,
    "backbone_cfg": {"select_layer": 1},
    "action_head_cfg": HEAD,
}
VISION = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"image_size": IMAGE, "patch_size": IMAGE // 2}
TEXT = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "rope_theta": 1e6}
LOW, HIGH = (-2.0, -1.0, -1.0, 0.0), (2.0, 1.0, 3.0, 0.0)
"""Of states; the last channel is constant."""
PARTS = {"arm": slice(0, 3), "gripper": slice(3, 4)}
CHOICES = {"embodiment_id": EMBODIMENT, "cameras": CAMERAS, "state": tuple(PARTS), "action": tuple(PARTS)}
CHOICES |= {"crop": 1.0, "execute_steps": 2}
DECODER = "action_head.action_decoder.layer2.W"
LM_HEAD = "backbone.eagle_model.language_model.lm_head.weight"


def words() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer()._tokenizer, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=SPECIAL
    )


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def save_eagle(out: Path) -> None:
    known = words()
    known.save_pretrained(out)
    write(out / "chat_template.json", {"chat_template": TEMPLATE})
    sizes = {"model_type": "eagle_2_5_vl", "image_token_index": known.convert_tokens_to_ids("<IMG_CONTEXT>")}
    text = TEXT | {"vocab_size": len(known)}
    write(out / "config.json", sizes | {"vision_config": VISION, "text_config": text})


def weights(directory: Path) -> dict[str, Tensor]:
    """With which every layer matters."""
    model = GrootN15(Architecture.read(directory))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values /= parameter.shape[-2 if name.endswith(".W") else -1] ** 0.5
        if parameter.ndim == 1:
            values = 0.2 * values + ("norm" in name and name.endswith("weight"))
        tensors[name] = values.to(parameter.dtype)
    return tensors


def save_nvidia(out: Path) -> None:
    """In NVIDIA's layout, in two shards."""
    write(out / "config.json", CONFIG)
    save_eagle(out / "eagle")
    statistics: dict[str, dict[str, Any]] = {"state": {}, "action": {}}
    modalities: dict[str, dict[str, Any]] = {"video": {camera: {} for camera in reversed(CAMERAS)}}
    for what, low, high in (("state", LOW, HIGH), ("action", [-scale for scale in SCALES], SCALES)):
        for name, part in PARTS.items():
            statistics[what][name] = {"min": low[part], "max": high[part], "mean": low[part], "std": high[part]}
        modalities[what] = {name: {"shape": [part.stop - part.start]} for name, part in PARTS.items()}
    embodiment = {"statistics": statistics, "modalities": modalities, "embodiment_tag": "mine"}
    write(out / "experiment_cfg" / "metadata.json", {"mine": embodiment})
    write(out / "groot_n15.json", CHOICES)
    tensors = list(weights(out).items())
    shards = {f"model-0000{i}-of-00002.safetensors": dict(tensors[i - 1 :: 2]) for i in (1, 2)}
    for file, shard in shards.items():
        save_file(shard, out / file)
    write(out / INDEX_FILE, {"weight_map": {name: file for file, shard in shards.items() for name in shard}})


def save_lerobot(out: Path, tensors: dict[str, Tensor]) -> None:
    """As lerobot 0.5.1 saves a fine-tuned policy."""
    save_eagle(out / "eagle")
    write(out / "base" / "config.json", CONFIG)
    images = {f"observation.images.{camera}": {"type": "VISUAL", "shape": [3, IMAGE, IMAGE]} for camera in CAMERAS}
    config = {"type": "groot", "base_model_path": "mine/base", "chunk_size": 50, "n_action_steps": 2}
    config["input_features"] = images | {"observation.state": {"type": "STATE", "shape": [STATE_DIM]}}
    config["output_features"] = {"action": {"type": "ACTION", "shape": [ACTION_DIM]}}
    write(out / "config.json", config)
    before, after = "policy_preprocessor", "policy_postprocessor"
    pack, unpack = "groot_pack_inputs_v3", "groot_action_unpack_unnormalize_v1"
    limits = {"observation.state.min": LOW, "observation.state.max": HIGH, "action.max": SCALES}
    statistics = {key: torch.tensor(value) for key, value in limits.items()}
    statistics["action.min"] = -statistics["action.max"]
    for name in (f"{before}_step_2_{pack}", f"{after}_step_0_{unpack}"):
        save_file(statistics, out / f"{name}.safetensors")
    settings = {"embodiment_tag": "mine", "embodiment_mapping": {"mine": EMBODIMENT}, "normalize_min_max": True}
    settings |= {"max_state_dim": STATE_DIM + 2, "max_action_dim": PADDED, "state_horizon": 1}
    steps = [{"registry_name": "rename_observations_processor", "config": {"rename_map": {}}}]
    steps += [{"registry_name": "to_batch_processor", "config": {}}]
    steps += [{"registry_name": pack, "config": settings, "state_file": f"{before}_step_2_{pack}.safetensors"}]
    steps += [{"registry_name": f"groot_eagle_{verb}_v3", "config": {}} for verb in ("encode", "collate")]
    write(out / f"{before}.json", {"name": before, "steps": steps})
    undo = {"env_action_dim": ACTION_DIM, "normalize_min_max": True}
    last = {"registry_name": unpack, "config": undo, "state_file": f"{after}_step_0_{unpack}.safetensors"}
    write(out / f"{after}.json", {"name": after, "steps": [last]})
    prefixed = {f"_groot_model.{name}": value for name, value in tensors.items() if name != LM_HEAD}
    save_file(prefixed, out / WEIGHTS_FILE)


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint; read-only."""
    out = tmp_path_factory.mktemp("source") / "nvidia"
    save_nvidia(out)
    return out


@pytest.fixture(scope="module")
def lerobots(nvidia: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in lerobot's layout; read-only."""
    out = tmp_path_factory.mktemp("source") / "lerobot"
    save_lerobot(out, weights(nvidia))
    return out


@pytest.fixture(scope="module")
def opened(nvidia: Path) -> GrootN15Policy:
    """To be left as it is."""
    policy = open_policy(nvidia)
    assert isinstance(policy, GrootN15Policy)
    return policy


@pytest.fixture
def small() -> Observation:
    """With images that need no resizing, in which the layouts differ."""
    return random_observations(2, seed=1, image=IMAGE)


@pytest.fixture(scope="module")
def packed(
    nvidia: Path, observations: Observation, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The quantized checkpoint of a bundled recipe; read-only."""

    @cache
    def make(name: str) -> Path:
        out = tmp_path_factory.mktemp("packed") / name
        api.quantize(nvidia, recipe(name), out, calibration=api.CalibrationSet(observations[:2], ("random:1",)))
        return out

    return make


def recipe(name: str) -> Recipe:
    """The default recipe with smaller blocks and no search for scales, any other as it is."""
    changes = ["transform.block_size=32", "weight.group_size=32", "activation.group_size=32"]
    changes = [*changes, "weight.scale_search=max"] if name == "omega-int4" else []
    return with_settings(read_recipe(name), changes, name=name)


def altered(source: Path, out: Path, file: str, change: Callable[[Any], Any]) -> Path:
    """A copy of a checkpoint with another JSON file, or without it where the change returns None."""
    shutil.copytree(source, out)
    changed = change(json.loads((out / file).read_text()))
    (out / file).unlink()
    if changed is not None:
        write(out / file, changed)
    return out


# Layouts


def test_both_layouts_give_the_same_actions(opened: GrootN15Policy, lerobots: Path, small: Observation) -> None:
    other = open_policy(lerobots)
    assert other.family == opened.family == "groot_n15"
    assert other.execute_steps == opened.execute_steps == 2
    actions = opened.infer(small, random_noise(2, 2))
    assert actions.shape == (2, CHUNK, ACTION_DIM) and actions.dtype == np.float32
    assert np.array_equal(other.infer(small, random_noise(2, 2)), actions)


def test_a_later_groot_of_lerobot_is_told_apart(lerobots: Path, tmp_path: Path) -> None:
    assert recognized(lerobots).family == "groot_n15"
    shutil.copy(lerobots / "config.json", tmp_path)
    save_file({"_groot_model.backbone.model.x": torch.zeros(1)}, tmp_path / WEIGHTS_FILE)
    assert recognized(tmp_path).family == "groot"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop(f"_groot_model.{DECODER}"), f"lacks {DECODER}"),
        (lambda tensors: tensors.update(surprise=torch.zeros(1)), "holds surprise"),
        (lambda tensors: tensors.update({DECODER: torch.zeros(1)}), f"both stand for {DECODER}"),
        (lambda tensors: tensors[f"_groot_model.{DECODER}"].fill_(torch.nan), f"{DECODER} contains NaN"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], object], reason: str, lerobots: Path, tmp_path: Path
) -> None:
    out = tmp_path / "altered"
    shutil.copytree(lerobots, out)
    tensors = load_file(out / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, out / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=reason):
        open_policy(out)


def at(value: Any, *path: str | int) -> Callable[[Any], Any]:
    """Sets a value in the content of a JSON file."""

    def change(content: Any) -> Any:
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return content

    return change


def without(content: Any) -> None:
    return None


METADATA, CHOSEN = "experiment_cfg/metadata.json", "groot_n15.json"


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        (METADATA, without, "metadata.json is missing"),
        (METADATA, at([], "mine", "statistics", "state", "arm", "min"), r"state\.arm: min is \[\] instead of 3"),
        (METADATA, at({}, "mine", "statistics", "action", "arm"), r"statistics\.action\.arm lacks min"),
        (METADATA, at({}, "other"), r"other\.modalities is missing"),
        (METADATA, at("quaternion", "mine", "modalities", "state", "arm", "rotation_type"), "'arm' is a rotation"),
        (CHOSEN, without, "leaves cameras open: front, back; state in .*groot_n15.json, under 'cameras'"),
        (CHOSEN, at(["side"], "cameras"), "cameras is side; name some of front, back"),
        (CHOSEN, at(["arm", "arm"], "state"), "state is arm, arm; name some of arm, gripper, each once"),
        (CHOSEN, at([], "action"), "action is empty"),
        (CHOSEN, at(None, "embodiment_id"), "which number the embodiment 'mine' has"),
        (CHOSEN, at(3, "embodiment_id"), "the embodiment's number is 3, but the model has room for 2"),
        (CHOSEN, at("gr1", "embodiment"), "embodiment is gr1; name some of mine"),
        (CHOSEN, at(9, "execute_steps"), "the number of executed steps is 9, but the model has room for 4"),
        (CHOSEN, at(0.0, "crop"), "crop is 0.0"),
        (CHOSEN, at(1, "camera"), "camera is unknown"),
        (CHOSEN, at({"leg": "q99"}, "state_normalization"), "names 'leg', which is not in state"),
        (CHOSEN, at({"arm": "none"}, "action_normalization"), r"action_normalization\.arm is 'none'"),
        (CHOSEN, at({"arm": "sin_cos"}, "action_normalization"), "sin_cos for 'arm'; only states"),
        (CHOSEN, at({"arm": "q99"}, "action_normalization"), r"action\.arm lacks q01"),
        ("eagle/chat_template.json", without, "no chat template.*eagle2hg-processor-groot-n1p5"),
        ("eagle/chat_template.json", at("{{ messages[0].role }}", "chat_template"), r"places for the images \[\]"),
        ("eagle/chat_template.json", at("{% if %}", "chat_template"), "template is not Eagle's"),
        ("eagle/tokenizer.json", without, "eagle holds no tokenizer; put vocab.json, merges.txt"),
        ("eagle/tokenizer.json", at(1, "model"), "holds no tokenizer that can be read"),
        ("eagle/config.json", at(1, "image_token_index"), "<IMG_CONTEXT> the number .* but the model has 1"),
    ],
)
def test_a_malformed_checkpoint_of_nvidia_is_refused(
    file: str, change: Callable[[Any], Any], reason: str, nvidia: Path, tmp_path: Path
) -> None:
    out = altered(nvidia, tmp_path / "altered", file, change)
    with pytest.raises(CheckpointError, match=reason):
        Processing(out, Architecture.read(out))


BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("base/config.json", without, "mine/base, whose sizes are not known here; put its config.json into .*base"),
        ("base/config.json", at(1, "surprise"), r"base/config\.json: surprise is unknown"),
        ("config.json", at({}, "output_features"), "does not state the width of action"),
        ("config.json", at({}, "input_features"), r"names no observation\.images"),
        (BEFORE, without, "policy_preprocessor.json is missing"),
        (BEFORE, at([], "steps"), "has 0 steps rename_observations_processor instead of one"),
        (BEFORE, at("mystery", "steps", 1, "registry_name"), "the step mystery is none of GR00T N1.5"),
        (BEFORE, at("elsewhere", "steps", 2, "state_file"), "are to lie in 'elsewhere', which is not there"),
        (BEFORE, at({}, "steps", 2, "config", "embodiment_mapping"), "no number for 'mine'"),
        (BEFORE, at(5, "steps", 2, "config", "max_state_dim"), "max_state_dim is 5, but the model has 6"),
        (BEFORE, at(True, "steps", 2, "config", "formalize_language"), "formalize_language is True"),
        (
            BEFORE,
            at({"observation.images.back": "x"}, "steps", 0, "config", "rename_map"),
            r"renames observation\.images\.back",
        ),
        (AFTER, at(3, "steps", 0, "config", "env_action_dim"), "env_action_dim is 3, but .* actions of width 4"),
        (AFTER, at(False, "steps", 0, "config", "normalize_min_max"), "normalize_min_max is False"),
    ],
)
def test_a_malformed_checkpoint_of_lerobot_is_refused(
    file: str, change: Callable[[Any], Any], reason: str, lerobots: Path, tmp_path: Path
) -> None:
    out = altered(lerobots, tmp_path / "altered", file, change)
    with pytest.raises(CheckpointError, match=reason):
        open_policy(out)


# What reaches the model


def test_the_prompt(opened: GrootN15Policy, small: Observation) -> None:
    inputs = opened._processing.inputs(replace(small, instructions=("reach a goal", "open")))
    image = f"<img>{'<IMG_CONTEXT>' * PATCHES}</img>"
    text = f"user <image 1>{image}<image 2>{image}['reach a goal']<|im_end|> assistant"
    expected = words()(text)["input_ids"]
    assert inputs.input_ids[0].tolist() == expected and inputs.attention_mask[0].all()
    assert (~inputs.attention_mask[1]).tolist() == [True] * 2 + [False] * (len(expected) - 2)  # at the left
    assert (inputs.input_ids == words().convert_tokens_to_ids("<IMG_CONTEXT>")).sum() == 2 * 2 * PATCHES
    with pytest.raises(ValueError, match="places for the images"):
        opened._processing.inputs(replace(small, instructions=("reach <image-3>", "open")))


def test_images_states_and_embodiment(opened: GrootN15Policy, small: Observation) -> None:
    inputs = opened._processing.inputs(small)
    stacked = np.stack([small.images[camera] for camera in CAMERAS], axis=1).reshape(-1, IMAGE, IMAGE, 3)
    expected = torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(inputs.pixel_values, expected, rtol=0, atol=1e-6)
    state = small.state.astype(np.float64)
    low, high = np.array(LOW[:3]), np.array(HIGH[:3])
    assert np.allclose(inputs.state[:, 0, :3], 2 * (state[:, :3] - low) / (high - low) - 1, atol=1e-6)
    assert not inputs.state[:, 0, 3:].any()  # the constant channel and padding
    assert inputs.embodiment_id.tolist() == [EMBODIMENT] * 2


def test_images_are_cut_and_resized(nvidia: Path, lerobots: Path, tmp_path: Path) -> None:
    """A border that the cut takes away has no influence; without a cut it has."""
    cut = altered(nvidia, tmp_path / "cut", CHOSEN, at(0.5, "crop"))
    for directory, whole in ((cut, False), (nvidia, True), (lerobots, True)):
        processing = Processing(directory, Architecture.read(nvidia))
        observation = random_observations(1, seed=3, image=4 * IMAGE)
        before = processing.inputs(observation).pixel_values
        for image in observation.images.values():
            image[:, :IMAGE] = image[:, -IMAGE:] = image[:, :, :IMAGE] = image[:, :, -IMAGE:] = 0
        after = processing.inputs(observation).pixel_values
        assert before.shape == (2, 3, IMAGE, IMAGE) and -1 <= before.min() < before.max() <= 1
        assert (not torch.equal(before, after)) == whole


def test_actions_are_in_physical_units(opened: GrootN15Policy, small: Observation) -> None:
    noise = random_noise(2, 2)
    with torch.no_grad(), float_products():
        normalized = opened.sample(small, noise)
    assert np.allclose(opened.infer(small, noise), normalized * torch.tensor(SCALES), rtol=1e-6)
    bounds = opened.action_bounds()
    assert bounds is not None
    for bound, end in zip(bounds, (-1.0, 1.0), strict=True):
        assert np.allclose(bound, end * np.array(SCALES))


@pytest.mark.parametrize("mode", ["min_max", "mean_std", "q99"])
def test_physical_units_are_the_way_back(mode: Mode) -> None:
    statistics = {name: [float(i), -2.0] for i, name in enumerate(("min", "mean", "q01", "std", "max", "q99"))}
    both = Normalization.measured(mode, 2, statistics, "here")
    x = torch.tensor([[1.5, -2.0], [2.5, -2.0]])
    if mode == "mean_std":
        assert torch.equal(both.normalize(x), (x - torch.tensor([1.0, -2.0])) / torch.tensor([3.0, -2.0]))
    torch.testing.assert_close(
        both.physical(both.normalize(x))[:, 0], x[:, 0].clamp(min=2) if mode == "q99" else x[:, 0]
    )


def test_other_normalizations() -> None:
    angles = torch.tensor([[0.3, 0.7]])
    sine = Normalization.measured("sin_cos", 2, {}, "here")
    assert sine.normalized_width == 4
    assert torch.equal(sine.normalize(angles), torch.tensor([[*angles[0].sin(), *angles[0].cos()]]))
    binary = Normalization.measured("binary", 2, {}, "here")
    assert binary.normalize(angles).tolist() == binary.physical(angles).tolist() == [[0.0, 1.0]]
    constant = Normalization.measured("q99", 2, {"q01": [0.0, 0.5], "q99": [1.0, 0.5]}, "here")
    torch.testing.assert_close(constant.normalize(torch.tensor([[2.0, 0.7]])), torch.tensor([[1.0, 0.7]]))


def test_every_input_matters(opened: GrootN15Policy, small: Observation) -> None:
    noise = random_noise(2, 2)
    actions = opened.infer(small, noise)
    dark = {name: image * (name != "front") for name, image in small.images.items()}
    for other in (
        replace(small, images=dark),
        replace(small, state=-small.state),
        replace(small, instructions=("push the puck",) * 2),
    ):
        assert not np.allclose(actions, opened.infer(other, noise), atol=1e-4)
    assert not np.allclose(actions, opened.infer(small, noise + 0.1), atol=1e-4)
    assert np.array_equal(actions, opened.infer(small, noise))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": {}}, "camera 'back' is missing; the policy was trained with back, front"),
        ({"state": np.zeros((2, 3), np.float32)}, "the state has 3 channels instead of 4"),
    ],
)
def test_observations_that_do_not_fit(
    change: dict[str, Any], reason: str, opened: GrootN15Policy, small: Observation
) -> None:
    with pytest.raises(ValueError, match=reason):
        opened.infer(replace(small, **change), random_noise(2, 2))


def test_it_continues_no_previous_chunk(opened: GrootN15Policy, small: Observation) -> None:
    assert opened.interface().previous_actions == 0
    left = PreviousChunk(np.zeros((2, 1, ACTION_DIM), np.float32), delay=0)
    with pytest.raises(ValueError, match=r"GR00T N1\.7 do real-time chunking.*leave the previous chunk out"):
        opened.infer(small, random_noise(2, 2), left)


# Anatomy


def test_a_site_is_what_reads_one_tensor_in_the_order_of_execution(
    opened: GrootN15Policy, small: Observation
) -> None:
    """In every call, all linears of a site read the same tensor, and the next site reads another; vision and
    language run once, action in every step."""
    reads: list[tuple[str, Tensor]] = []
    steps: dict[str, list[int]] = {}

    def listener(name: str, part: str) -> Callable[..., None]:
        def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            reads.append((name, inputs[0]))
            if part == "action":
                steps.setdefault(name, []).append(opened.step.current)
            else:
                assert not opened.step.running

        return listen

    handles = [
        opened.module.get_submodule(name).register_forward_pre_hook(listener(name, site.part))
        for site in opened.sites()
        for name in site.linears
    ]
    opened.infer(small, random_noise(2, 2))
    for handle in handles:
        handle.remove()
    runs = [frozenset(name for name, _ in run) for _, run in groupby(reads, key=lambda read: id(read[1]))]
    sites = {frozenset(site.linears): site for site in opened.sites()}
    assert list(dict.fromkeys(runs)) == list(sites)
    assert Counter(runs) == {linears: STEPS if s.part == "action" else 1 for linears, s in sites.items()}
    assert set(steps) == {name for site in opened.sites() if site.part == "action" for name in site.linears}
    assert all(seen == list(range(STEPS)) for seen in steps.values())
    assert not opened.step.running


def test_every_linear_is_planned(opened: GrootN15Policy) -> None:
    plan = build_plan(read_recipe("rtn"), opened)
    linears = {name for name, module in opened.module.named_modules() if isinstance(module, nn.Linear)}
    assert {linear.name for linear in plan.linears} == linears
    quantized = Counter(linear.part for linear in plan.linears if linear.site is not None)
    assert quantized == {"language": 7, "action": 2 * 6}
    assert sum(linear.part == "vision" for linear in plan.linears) == 6
    with pytest.raises(KeyError, match="the groot_n15 adapter does not know the linear layer"):
        opened.kept_because("action_head.new_projection")


def test_attentions_return_their_weights(opened: GrootN15Policy, small: Observation) -> None:
    shapes: dict[str, list[int]] = {}
    handles = [
        opened.module.get_submodule(attention.name).register_forward_hook(
            lambda module, inputs, result, name=attention.name: shapes.update({name: list(result[1].shape)})
        )
        for attention in opened.attentions()
    ]
    opened.infer(small, random_noise(2, 2))
    for handle in handles:
        handle.remove()
    tokens = 1 + 2 + CHUNK
    assert [shape[:3] for shape in shapes.values()] == [[2, 4, tokens]] * 2
    assert [shape[3] == tokens for shape in shapes.values()] == [False, True]
    linears = {name for site in opened.sites() for name in site.linears}
    assert {name for a in opened.attentions() for name in (a.query, a.output)} <= linears


def test_the_released_size(nvidia: Path, tmp_path: Path) -> None:
    """Without values, and with the tokenizer of the small one."""
    shutil.copytree(nvidia, tmp_path / "full", ignore=shutil.ignore_patterns("model*"))
    head = asdict(RELEASED.action_head)
    both = {key: head[key] for key in ("action_dim", "action_horizon")}
    backbone = asdict(RELEASED.backbone)
    write(tmp_path / "full" / "config.json", CONFIG | both | {"backbone_cfg": backbone, "action_head_cfg": head})
    image_token = words().convert_tokens_to_ids("<IMG_CONTEXT>")
    write(tmp_path / "full" / "eagle" / "config.json", asdict(RELEASED.eagle) | {"image_token_index": image_token})
    module = GrootN15Policy.without_values(tmp_path / "full")
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    policy = GrootN15Policy(module, tmp_path / "full", "full size", "float")
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for site in policy.sites():
        counts[site.part] += len(site.linears)
        sizes[site.part] += sum(module.get_submodule(name).weight.numel() for name in site.linears)
    assert counts == {"vision": 162, "language": 84, "action": 96}
    assert (sizes["language"], sizes["action"]) == (603_979_776, 465_567_744)
    plan = build_plan(read_recipe("omega-int4"), policy)
    assert sum(linear.site is not None for linear in plan.linears) == 84 + 96


def test_lerobots_layout_of_the_release(lerobots: Path, tmp_path: Path) -> None:
    """Its sizes need not be stated."""
    config = json.loads((lerobots / "config.json").read_text())
    write(tmp_path / "config.json", config | {"base_model_path": "nvidia/GR00T-N1.5-3B"})
    assert read_architecture(tmp_path) == RELEASED


# Quantized

RECIPES = ("rtn", "omega-int4", "omega-qvla")


@pytest.fixture(scope="module")
def elsewhere(
    packed: Callable[[str], Path], infer_elsewhere: Callable[[list[Path]], list[np.ndarray]]
) -> dict[str, np.ndarray]:
    """Actions of the quantized policies in a new process."""
    return dict(zip(RECIPES, infer_elsewhere([packed(name) for name in RECIPES]), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_a_new_process_gives_the_same_actions(
    name: str,
    packed: Callable[[str], Path],
    opened: GrootN15Policy,
    observations: Observation,
    noise: Tensor,
    elsewhere: dict[str, np.ndarray],
) -> None:
    policy = load_policy(packed(name))
    actions, expected = policy.infer(observations, noise), opened.infer(observations, noise)
    assert np.array_equal(actions, elsewhere[name])
    assert 0 < np.square(actions - expected).mean() / np.square(expected).mean() < 0.5
    linears = [module for module in policy.module.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 7 + 2 * 6
    assert np.array_equal(load_policy(packed(name), "simulated").infer(observations, noise), actions)


def test_lerobots_layout_can_be_quantized(lerobots: Path, small: Observation, tmp_path: Path) -> None:
    api.quantize(lerobots, recipe("rtn"), tmp_path / "out")
    assert load_policy(tmp_path / "out").infer(small, random_noise(2, 2)).shape == (2, CHUNK, ACTION_DIM)


def test_weights_can_stay_on_disk(
    nvidia: Path, opened: GrootN15Policy, observations: Observation, noise: Tensor
) -> None:
    streamed = open_policy(nvidia, streamed=True)
    assert np.array_equal(streamed.infer(observations, noise), opened.infer(observations, noise))
