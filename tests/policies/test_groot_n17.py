"""GR00T N1.7: a base model and a VLM that its checkpoint only names, and noise that lerobot draws itself."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")  # what lerobot's GR00T is built from
pytest.importorskip("tree")

from lerobot.configs import PreTrainedConfig
from lerobot.policies.groot import GrootConfig, GrootPolicy, make_groot_pre_post_processors
from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from omega_qvla import api
from omega_qvla.lerobot_plugin.modeling_omega_qvla import OmegaQVLAPolicy
from omega_qvla.pack.checkpoint import read
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.float_products import float_products
from omega_qvla.policies.groot_n17 import BASE_DIRECTORY, VLM_DIRECTORY, GrootN17
from omega_qvla.policy import Observation, PreviousChunk
from omega_qvla.quantization import build_plan
from omega_qvla.quantization.sensitivity import ActionProbe
from omega_qvla.runtime import QuantizedLinear
from omega_qvla.spec import Recipe, read_recipe, with_settings
from tiny_policy import ACTION_DIM, CHUNK, SCALES, STATE_DIM, randomize, settings, tokenizer

ACTION = "_groot_model.action_head.model.transformer_blocks"
HORIZON, PADDED, STEPS = CHUNK + 2, ACTION_DIM + 2, 3
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
TEXT = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "dtype": "float32"}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
VISION = {"hidden_size": 64, "intermediate_size": 64, "depth": 2, "num_heads": 4, "patch_size": 16}
VISION |= {"out_hidden_size": 128, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
HEAD: dict[str, Any] = {
    "backbone_embedding_dim": 128,
    "select_layer": 2,
    "max_state_dim": STATE_DIM + 1,
    "max_action_dim": PADDED,
    "action_horizon": HORIZON,
    "hidden_size": 64,
    "input_embedding_dim": 64,
    "max_seq_len": 16,
    "max_num_embodiments": 11,
    "num_inference_timesteps": STEPS,
    "diffusion_model_cfg": {
        "positional_embeddings": None,
        "num_layers": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "output_dim": 64,
        "interleave_self_attention": True,
    },
    "vl_self_attention_cfg": {
        "positional_embeddings": None,
        "num_layers": 1,
        "num_attention_heads": 8,
        "attention_head_dim": 16,
    },
}


def save_vlm(out: Path) -> None:
    """What lies in the VLM's hub repository besides weights."""
    special = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    special |= {f"vision_{place}_token": f"<|vision_{place}|>" for place in ("start", "end")}
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer()._tokenizer, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=special
    )
    ids = {f"{name}_id": words.convert_tokens_to_ids(token) for name, token in special.items()}
    text = TEXT | {"vocab_size": len(words)}
    Qwen3VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=True, **ids).save_pretrained(out)
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    images, video = Qwen2VLImageProcessor(patch_size=16, size=size), Qwen3VLVideoProcessor()
    Qwen3VLProcessor(images, words, video, chat_template=TEMPLATE).save_pretrained(out)
    images.save_pretrained(out)


def save_groot(out: Path, base: Path, dtype: str = "float32", **changes: Any) -> None:
    """A checkpoint as lerobot saves it after training from the base model that is written to `base`.

    `dtype` is that of the base model, `changes` are of the policy's configuration. What it only names on the hub
    lies in its own `base` and `vlm`.
    """
    save_vlm(out / VLM_DIRECTORY)
    torch.manual_seed(0)
    described = GR00TN17Config(**HEAD, model_name=str(out / VLM_DIRECTORY))
    GR00TN17(described, load_backbone_weights=False).to(getattr(torch, dtype)).save_pretrained(base)
    dimensions = {"max_state_dim": STATE_DIM + 1, "max_action_dim": PADDED, "base_model_path": str(base)}
    own = {key: value for key, value in settings(64).items() if key != "tokenizer_max_length"}
    config = GrootConfig(**own | dimensions | changes)
    policy = GrootPolicy(config)
    randomize(policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith((".W", ".b")):
                parameter.normal_(0, parameter.shape[-2] ** -0.5)
    config.base_model_path = "nvidia/GR00T-N1.7-3B"
    one, scales = torch.ones(STATE_DIM), 2 * torch.tensor(SCALES)
    statistics = {"observation.state": {"min": -one, "max": one}, "action": {"min": -scales, "max": scales}}
    before, after = make_groot_pre_post_processors(config, statistics)
    encode = before.steps[3]
    encode.image_target_size, encode.image_crop_size = [64, 64], [58, 58]
    for pipeline in (before, after):
        pipeline.save_pretrained(out)
    policy.save_pretrained(out)
    (out / BASE_DIRECTORY).mkdir()
    shutil.copy(base / "config.json", out / BASE_DIRECTORY)


def draw(count: int, seed: int = 2) -> Tensor:
    return torch.randn(count, HORIZON, PADDED, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub") / "base"


@pytest.fixture(scope="module")
def groot(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint; read-only."""
    out = tmp_path_factory.mktemp("source") / "groot"
    save_groot(out, base)
    return out


@pytest.fixture(scope="module")
def opened(groot: Path) -> GrootN17:
    """To be left as it is."""
    return GrootN17.open(groot)


@pytest.fixture(scope="module")
def few(observations: Observation) -> Observation:
    return observations[:2]


@pytest.fixture(scope="module")
def packed(groot: Path, few: Observation, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The quantized checkpoint of a bundled recipe; read-only."""

    @cache
    def make(name: str) -> Path:
        out = tmp_path_factory.mktemp("packed") / name
        api.quantize(groot, recipe(name), out, calibration=api.CalibrationSet(few, ("random:1",)))
        return out

    return make


def recipe(name: str) -> Recipe:
    """The default recipe with smaller blocks and no search for scales, any other as it is."""
    changes = ["transform.block_size=32", "weight.group_size=32", "activation.group_size=32"]
    changes = [*changes, "weight.scale_search=max"] if name == "omega-int4" else []
    return with_settings(read_recipe(name), changes, name=name)


def linears_of(policy: GrootN17) -> set[str]:
    return {name for name, module in policy.module.named_modules() if isinstance(module, nn.Linear)}


def changed(source: Path, out: Path, file: str, **changes: Any) -> Path:
    """A copy of a checkpoint with other entries in a JSON file."""
    shutil.copytree(source, out)
    path = out / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return out


# Inference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_actions_are_lerobots(
    dtype: str, groot: Path, base: Path, few: Observation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the policy that lerobot opens by itself, where it draws this noise and leaves autocast out."""
    if dtype == "bfloat16":
        groot, base = tmp_path / "groot", tmp_path / "base"
        save_groot(groot, base, dtype, model_params_fp32=False)
    config = PreTrainedConfig.from_pretrained(groot)
    config.base_model_path, config.use_bf16 = str(base), False
    expected, policy, noise = GrootPolicy.from_pretrained(groot, config=config), GrootN17.open(groot), draw(2)
    assert {str(parameter.dtype) for parameter in policy.module.parameters()} == {f"torch.{dtype}"}
    loaded = policy.module.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    batch = policy._preprocessor(policy._batch(few))
    monkeypatch.setattr(torch, "randn", lambda size, dtype, device: noise.to(dtype))
    with torch.no_grad(), float_products():
        chunk = expected.predict_action_chunk(dict(batch))
        monkeypatch.undo()
        actions = policy.sample(few, noise)
    assert chunk.shape == (2, policy.execute_steps, ACTION_DIM) and actions.shape == (2, CHUNK, ACTION_DIM)
    assert torch.equal(actions[:, : policy.execute_steps], chunk.float())
    assert np.array_equal(policy.infer(few, noise), policy._postprocessor(actions).numpy())


def test_autocast_changes_no_more_than_rounding(groot: Path, opened: GrootN17, few: Observation) -> None:
    """What is left out of lerobot's own run."""
    with torch.autocast("cpu", torch.bfloat16):
        rounded = opened.infer(few, draw(2))
    assert 0 < np.abs(rounded - opened.infer(few, draw(2))).max() < 0.1


def test_every_input_matters(opened: GrootN17, few: Observation) -> None:
    noise = draw(2)
    actions = opened.infer(few, noise)
    dark = {name: image * (name != "front") for name, image in few.images.items()}
    for other in (
        replace(few, images=dark),
        replace(few, state=-few.state),
        replace(few, instructions=("push the puck",) * 2),
    ):
        assert not np.allclose(actions, opened.infer(other, noise), atol=1e-4)
    assert not np.allclose(actions, opened.infer(few, noise + 0.1), atol=1e-4)
    assert np.array_equal(actions, opened.infer(few, noise))


def test_noise_of_zeros_is_noise(opened: GrootN17, few: Observation) -> None:
    """lerobot takes zeros at the end of a previous chunk for padding, which would let it draw its own."""
    zeros = torch.zeros(2, HORIZON, PADDED)
    assert np.array_equal(opened.infer(few, zeros), opened.infer(few, zeros))
    assert torch.equal(opened.partial[0], zeros[:, :CHUNK])


def test_denoising_ends_in_the_actions(opened: GrootN17, few: Observation) -> None:
    chunks = opened.denoise(few, draw(2))
    assert chunks.shape == (STEPS, 2, CHUNK, PADDED)
    with torch.no_grad():
        assert torch.equal(chunks[-1, ..., :ACTION_DIM], opened.sample(few, draw(2)))
    assert (chunks[1:, ..., :ACTION_DIM] - chunks[:-1, ..., :ACTION_DIM]).flatten(1).norm(dim=1).min() > 0


def test_weights_can_stay_on_disk(groot: Path, opened: GrootN17, few: Observation) -> None:
    streamed = GrootN17.open(groot, streamed=True)
    assert np.array_equal(streamed.infer(few, draw(2)), opened.infer(few, draw(2)))


# Real-time chunking


def left_over(left: int, delay: int, horizon: int | None = None) -> PreviousChunk:
    actions = np.random.default_rng(3).uniform(-1, 1, (2, left, ACTION_DIM)) * SCALES
    return PreviousChunk(actions.astype(np.float32), delay, horizon)


@pytest.mark.parametrize(("left", "delay"), [(CHUNK, 2), (3, 0), (2, 2)])
def test_a_chunk_continues_the_one_before_as_in_lerobot(
    left: int, delay: int, groot: Path, base: Path, few: Observation, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PreTrainedConfig.from_pretrained(groot)
    config.base_model_path, config.use_bf16, config.rtc_ramp_rate = str(base), False, 3.0
    expected, policy, noise = GrootPolicy.from_pretrained(groot, config=config), GrootN17.open(groot), draw(2)
    policy.module.config.rtc_ramp_rate = 3.0
    earlier, batch = left_over(left, delay), policy._preprocessor(policy._batch(few))
    normalized = torch.from_numpy(earlier.actions / (2 * np.array(SCALES, np.float32)))
    monkeypatch.setattr(torch, "randn", lambda size, dtype, device: noise.clone())
    with torch.no_grad():
        chunk = expected.predict_action_chunk(batch, inference_delay=delay, prev_chunk_left_over=normalized)
    monkeypatch.undo()
    actions = policy.infer(few, noise, earlier)[:, : policy.execute_steps]
    assert np.allclose(actions, policy.physical(chunk).numpy(), rtol=1e-4, atol=1e-5)
    assert np.allclose(actions[:, :delay], earlier.actions[:, : min(delay, policy.execute_steps)], atol=1e-5)


def test_without_a_previous_chunk_nothing_changes(opened: GrootN17, few: Observation) -> None:
    before = opened.infer(few, draw(2))
    assert not np.allclose(opened.infer(few, draw(2), left_over(CHUNK, 1)), before)
    assert np.array_equal(opened.infer(few, draw(2)), before)
    assert opened.interface().previous_actions == CHUNK
    with pytest.raises(ValueError, match=r"instead of \[2, 1 to 4, 4\]"):
        opened.infer(few, draw(2), left_over(HORIZON, 1))


def test_a_gripper_that_is_turned_around_cannot_be_given_back(groot: Path, few: Observation, tmp_path: Path) -> None:
    turned = changed(groot, tmp_path / "libero", "config.json", action_decode_transform="libero")
    policy = GrootN17.open(turned)
    assert policy.interface().previous_actions == 0
    with pytest.raises(ValueError, match="takes no previous chunk"):
        policy.infer(few, draw(2), left_over(CHUNK, 1))


# Anatomy


def test_a_site_is_what_reads_one_tensor_in_the_order_of_execution(opened: GrootN17, few: Observation) -> None:
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
    opened.infer(few, draw(2))
    for handle in handles:
        handle.remove()
    runs = [frozenset(name for name, _ in run) for _, run in groupby(reads, key=lambda read: id(read[1]))]
    sites = {frozenset(site.linears): site for site in opened.sites()}
    assert list(dict.fromkeys(runs)) == list(sites)
    assert Counter(runs) == {linears: STEPS if s.part == "action" else 1 for linears, s in sites.items()}
    assert set(steps) == {name for site in opened.sites() if site.part == "action" for name in site.linears}
    assert all(seen == list(range(STEPS)) for seen in steps.values())
    assert not opened.step.running


def test_a_quantized_checkpoint_is_a_policy_of_lerobot(packed: Callable[[str], Path], few: Observation) -> None:
    directory = packed("rtn")
    config = PreTrainedConfig.from_pretrained(directory)
    policy = OmegaQVLAPolicy.from_pretrained(directory, config=config)
    batch: dict[str, Any] = {
        f"observation.images.{camera}": torch.from_numpy(image).permute(0, 3, 1, 2) / 255
        for camera, image in few.images.items()
    }
    batch |= {"observation.state": torch.from_numpy(few.state), "task": list(few.instructions)}
    assert config.image_features.keys() <= batch.keys()
    actions = policy.predict_action_chunk(batch, noise=draw(len(few)))
    assert np.array_equal(actions.numpy(), api.load(directory).infer(few, draw(len(few))))


def test_every_linear_is_planned(opened: GrootN17) -> None:
    plan = build_plan(read_recipe("rtn"), opened)
    assert {linear.name for linear in plan.linears} == linears_of(opened)
    quantized = Counter(linear.part for linear in plan.linears if linear.site is not None)
    assert quantized == {"language": 2 * 7, "action": 4 * 6}
    assert sum(linear.part == "vision" for linear in plan.linears) == 2 * 4
    refined = [linear for linear in plan.linears if "vl_self_attention" in linear.name]
    assert len(refined) == 6 and not any(linear.site for linear in refined)
    with pytest.raises(KeyError, match="the groot adapter does not know the linear layer"):
        opened.kept_because("_groot_model.action_head.new_projection")


def test_every_site_reaches_the_actions(opened: GrootN17, few: Observation) -> None:
    """Also the last language layer, whose output the action head reads."""
    linears = [name for site in opened.sites() for name in site.linears]
    gains = ActionProbe(opened, few, noise_seed=0).gains(linears, 1)
    assert [name for name in linears if not gains[name].any()] == []


def test_the_released_size(groot: Path, tmp_path: Path) -> None:
    """Without values, from lerobot's defaults, which are those of the release, but for fewer embodiments."""
    out = tmp_path / "full"
    shutil.copytree(groot, out, ignore=shutil.ignore_patterns("model.safetensors"))
    (out / BASE_DIRECTORY / "config.json").write_text('{"model_type": "Gr00tN1d7", "max_num_embodiments": 3}')
    preprocessor = json.loads((out / "policy_preprocessor.json").read_text())
    preprocessor["steps"][2]["config"] |= {"max_state_dim": 132, "embodiment_tag": "libero_sim"}
    (out / "policy_preprocessor.json").write_text(json.dumps(preprocessor))
    policy = GrootN17(GrootN17.without_values(out), out, "full size", "float")
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for site in policy.sites():
        counts[site.part] += len(site.linears)
        weights[site.part] += sum(policy.module.get_submodule(name).weight.numel() for name in site.linears)
    assert counts == {"vision": 96, "language": 112, "action": 192}
    assert weights == {"vision": 301_989_888, "language": 805_306_368, "action": 931_135_488}
    assert policy.noise_shape == (40, 132) and policy.denoising_steps == 4
    for name in ("rtn", "omega-int4", "omega-qvla"):
        assert {linear.name for linear in build_plan(read_recipe(name), policy).linears} == linears_of(policy)


# Quantized


@pytest.mark.parametrize("name", ["rtn", "omega-int4"])
def test_integers_and_simulation_agree(
    name: str, packed: Callable[[str], Path], opened: GrootN17, few: Observation
) -> None:
    integer, simulated = (GrootN17.load(read(packed(name)), how) for how in ("integer", "simulated"))
    actions, expected = integer.infer(few, draw(2)), opened.infer(few, draw(2))
    assert np.array_equal(actions, simulated.infer(few, draw(2)))
    assert 0 < np.square(actions - expected).mean() / np.square(expected).mean() < 0.2
    linears = [module for module in integer.module.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 2 * 7 + 4 * 6 and {linear.execution for linear in linears} == {"integer"}
    assert not [name for name, tensor in integer.module.named_parameters() if tensor.device.type == "meta"]


def test_scales_of_every_step_are_used(packed: Callable[[str], Path], few: Observation) -> None:
    """Also where a layer reads the same tensor in every step."""
    policy = GrootN17.load(read(packed("omega-qvla")), "integer")
    assert len(policy.denoise(few, draw(2))) == STEPS
    stored = {site.name: site for site in read(packed("omega-qvla")).sites if site.part == "action"}
    assert len(stored) == 4 * 6 and {len(site.tensors["step_scale"]) for site in stored.values()} == {STEPS}
    crossing = stored[f"{ACTION}.0.attn1.to_k.input"].tensors["step_scale"]
    assert torch.equal(crossing[0], crossing[-1])
    own = stored[f"{ACTION}.0.attn1.to_q.input"].tensors["step_scale"]
    assert not torch.equal(own[0], own[-1])


def test_a_quantized_checkpoint_is_complete_in_itself(packed: Callable[[str], Path]) -> None:
    policy = packed("rtn") / "policy"
    held = {str(path.relative_to(policy)) for path in policy.rglob("*") if path.is_file()}
    assert {"base/config.json", "vlm/config.json", "vlm/tokenizer.json", "policy_preprocessor.json"} <= held
    assert not [name for name in held if name.endswith("model.safetensors")]


# What does not fit


def test_a_base_model_that_is_not_there(groot: Path, tmp_path: Path) -> None:
    out = changed(groot, tmp_path / "out", "config.json", base_model_path="/nowhere/base")
    shutil.rmtree(out / BASE_DIRECTORY)
    with pytest.raises(CheckpointError, match=r"put the files of /nowhere/base, without weights, into .*/base"):
        GrootN17.open(out)


def test_a_vlm_that_is_not_there(groot: Path, tmp_path: Path) -> None:
    out = changed(groot, tmp_path / "out", f"{BASE_DIRECTORY}/config.json", model_name="/nowhere/vlm")
    shutil.rmtree(out / VLM_DIRECTORY)
    with pytest.raises(CheckpointError, match=r"put the files of /nowhere/vlm, without weights, into .*/vlm"):
        GrootN17.open(out)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("base/config.json", {"model_type": "gr00t_n1_5"}, "model_type 'gr00t_n1_5' instead of 'Gr00tN1d7'"),
        ("base/config.json", {"diffusion_model_cfg": {"experts": 2}}, "describe no GR00T N1.7 .*experts"),
        ("base/config.json", {"select_layer": 1}, r"model\.safetensors holds _groot_model.* unknown to the policy"),
        ("base/config.json", {"hidden_size": 32}, r"model\.safetensors: .* has shape \[.*\] instead of"),
        ("vlm/config.json", {"model_type": "llama"}, "model_type 'llama' instead of 'qwen3_vl'"),
    ],
)
def test_a_foreign_configuration(
    file: str, changes: dict[str, Any], message: str, groot: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        GrootN17.open(changed(groot, tmp_path / "out", file, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embodiment_tag": "octopus"}, "gives 'octopus' the number None; give it one of 0 to 10"),
        ({"embodiment_tag": "oxe_droid_relative_eef_relative_joint"}, "the number 24; give it one of 0 to 10"),
        ({"max_state_dim": 7}, "max_state_dim is 7, the model reads 5"),
        ({"video_modality_keys": ["front", "wrist"]}, "names 'wrist', but config.json has the cameras back, front"),
    ],
)
def test_inputs_that_lerobot_would_replace(
    changes: dict[str, Any], message: str, groot: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(groot, out)
    preprocessor = json.loads((out / "policy_preprocessor.json").read_text())
    preprocessor["steps"][2]["config"] |= changes
    (out / "policy_preprocessor.json").write_text(json.dumps(preprocessor))
    with pytest.raises(CheckpointError, match=message):
        GrootN17.open(out)
