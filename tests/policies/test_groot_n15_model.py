"""GR00T N1.5: the released names and shapes, and what holds for a small model whatever its weights.

`scripts/compare_groot_n15.py` compares it with lerobot 0.5.1, place by place, where that is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.groot_n15 import RELEASED, Architecture, GrootN15, Inputs
from omega_qvla.policies.groot_n15.transformer import Attention

IMAGE_TOKEN, PATCHES, HORIZON, ACTION_DIM, STATE_DIM = 40, 4, 5, 3, 6
CONFIG: dict[str, Any] = {
    "model_type": "gr00t_n1_5",
    "architectures": ["GR00T_N1_5"],
    "torch_dtype": "bfloat16",
    "action_dim": ACTION_DIM,
    "action_horizon": HORIZON,
    "backbone_cfg": {"select_layer": 2, "project_to_dim": None, "reproject_vision": False, "tune_llm": False},
    "action_head_cfg": {
        "action_dim": ACTION_DIM,
        "action_horizon": HORIZON,
        "max_state_dim": STATE_DIM,
        "hidden_size": 16,
        "input_embedding_dim": 24,
        "backbone_embedding_dim": 32,
        "num_inference_timesteps": 4,
        "max_num_embodiments": 3,
        "max_seq_len": 8,
        "num_target_vision_tokens": 2,
        "noise_s": 0.999,
        "diffusion_model_cfg": {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 4,
            "output_dim": 16,
            "cross_attention_dim": 32,
            "norm_type": "ada_norm",
            "interleave_self_attention": True,
            "positional_embeddings": None,
            "dropout": 0.2,
        },
        "vl_self_attention_cfg": {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "positional_embeddings": None,
        },
    },
}
EAGLE: dict[str, Any] = {
    "model_type": "eagle_2_5_vl",
    "image_token_index": IMAGE_TOKEN,
    "select_layer": -1,
    "use_pixel_shuffle": False,
    "mlp_connector_layers": 1,
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "text_config": {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
}
NVIDIA = """{"action_dim": 32, "action_head_cfg": {"action_dim": 32, "action_horizon": 16, "add_pos_embed": true,
"backbone_embedding_dim": 2048, "diffusion_model_cfg": {"attention_head_dim": 48, "cross_attention_dim": 2048,
"dropout": 0.2, "final_dropout": true, "interleave_self_attention": true, "norm_type": "ada_norm",
"num_attention_heads": 32, "num_layers": 16, "output_dim": 1024, "positional_embeddings": null},
"hidden_size": 1024, "input_embedding_dim": 1536, "max_action_dim": 32, "max_state_dim": 64,
"model_dtype": "float32", "noise_beta_alpha": 1.5, "noise_beta_beta": 1.0, "noise_s": 0.999,
"num_inference_timesteps": 4, "num_target_vision_tokens": 32, "num_timestep_buckets": 1000,
"tune_diffusion_model": true, "tune_projector": true, "use_vlln": true, "vl_self_attention_cfg":
{"attention_head_dim": 64, "dropout": 0.2, "final_dropout": true, "num_attention_heads": 32, "num_layers": 4,
"positional_embeddings": null}}, "action_horizon": 16, "architectures": ["GR00T_N1_5"], "attn_implementation": null,
"backbone_cfg": {"eagle_path": "NVEagle/eagle_er-qwen3_1_7B-Siglip2_400M_stage1_5_128gpu_er_v7_1mlp_nops",
"load_bf16": false, "project_to_dim": null, "reproject_vision": false, "select_layer": 12, "tune_llm": false,
"tune_visual": true, "use_flash_attention": true}, "hidden_size": 2048, "model_dtype": "float32",
"model_type": "gr00t_n1_5", "torch_dtype": "bfloat16", "transformers_version": "4.51.3"}"""
"""config.json of nvidia/GR00T-N1.5-3B."""
NAMES_SHA256 = "387d64377a3041223fceb900ccd87882b8ab858a716b985b6d73124098a2bb8b"
"""Of the sorted lines `name shape dtype` of the state of lerobot 0.5.1's GR00TN15, built from NVIDIA's
configurations."""

COMPARISON = Path(__file__).parents[2] / "scripts" / "compare_groot_n15.py"
LEROBOTS_ACTIONS = [
    [[2.2248, 0.4281, 0.4059, -0.0164, -1.8684], [2.7745, -2.1726, 0.9903, 0.0064, -0.9953]],
    [[1.9214, 0.1473, -0.0874, -1.0875, -0.7638], [1.4101, -1.2956, -1.3633, 0.6196, -1.5750]],
]
"""The first and the last of a chunk: what lerobot 0.5.1 computes for the comparison's weights and inputs."""


def save(directory: Path, *changes: tuple[str, Any]) -> Path:
    """A small model's configurations; a change is the dotted path of a setting and its value, None for none."""
    files = json.loads(json.dumps({"config.json": CONFIG, "eagle/config.json": EAGLE}))
    for path, value in changes:
        file, *sections, key = path.split(":")[0], *path.split(":")[1].split(".")
        place = files[file]
        for section in sections:
            place = place[section]
        if value is None:
            del place[key]
        else:
            place[key] = value
    (directory / "eagle").mkdir(parents=True)
    for file, content in files.items():
        (directory / file).write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return Architecture.read(save(tmp_path_factory.mktemp("groot") / "small"))


@pytest.fixture
def model(architecture: Architecture) -> GrootN15:
    """A small model in float32 whose every weight matters."""
    made = GrootN15(architecture, torch.float32).eval()
    randomize(made)
    return made


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values /= parameter.shape[-2 if parameter.ndim == 3 else -1] ** 0.5
        parameter.data = (0.2 * values + 1 if "norm" in name or "vlln.weight" in name else values).to(parameter.dtype)


@pytest.fixture
def inputs() -> Inputs:
    """Two observations with two images each; the second has three words less, padded at the left."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, IMAGE_TOKEN, (2, 7), generator=generator)
    ids = torch.cat([torch.full((2, 2 * PATCHES), IMAGE_TOKEN), words], dim=1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    ids[1] = ids[1].roll(3)
    ids[1, :3], mask[1, :3] = 0, False
    return Inputs(
        pixel_values=torch.rand(4, 3, 28, 28, generator=generator) * 2 - 1,
        input_ids=ids,
        attention_mask=mask,
        state=torch.randn(2, 1, STATE_DIM, generator=generator),
        embodiment_id=torch.tensor([2, 0]),
    )


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, HORIZON, ACTION_DIM, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def full_size() -> GrootN15:
    """The released size, without values."""
    with torch.device("meta"):
        return GrootN15(RELEASED)


def second(inputs: Inputs, ids: Tensor, mask: Tensor) -> Inputs:
    """The second observation alone, with other tokens."""
    return Inputs(inputs.pixel_values[2:], ids[None], mask[None], inputs.state[1:], inputs.embodiment_id[1:])


def test_names_shapes_and_dtypes_are_the_released_ones(full_size: GrootN15) -> None:
    lines = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in full_size.state_dict().items()]
    assert len(lines) == 899
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == NAMES_SHA256


def test_the_papers_count_of_linears(full_size: GrootN15) -> None:
    stacks = {
        "language": (full_size.backbone.eagle_model.language_model.model.layers, 84, 603_979_776),
        "action": (full_size.action_head.model.transformer_blocks, 96, 465_567_744),
    }
    for part, (stack, count, weights) in stacks.items():
        linears = [m for name, m in stack.named_modules() if isinstance(m, nn.Linear) and "norm" not in name]
        assert (len(linears), sum(m.weight.numel() for m in linears)) == (count, weights), part


def test_nvidias_configuration_is_the_released_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(NVIDIA)
    assert Architecture.read(tmp_path) == RELEASED


def test_actions_are_what_lerobot_computes() -> None:
    spec = importlib.util.spec_from_file_location("compare_groot_n15", COMPARISON)
    assert spec and spec.loader
    comparison = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(comparison)
    model = GrootN15(comparison.architecture(), torch.float32).eval()
    comparison.draw_weights(model)
    inputs = comparison.batch()
    noise = inputs.pop("noise")
    with torch.no_grad():
        actions = model.sample_actions(Inputs(**inputs), noise)
    torch.testing.assert_close(actions[:, [0, -1]], torch.tensor(LEROBOTS_ACTIONS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("config.json:model_type", "gr00t_n1", "model_type is 'gr00t_n1', which is not supported"),
        ("config.json:action_horizon", None, "action_horizon is missing"),
        ("config.json:action_horizon", 4, "action_horizon is 4, but action_head_cfg.action_horizon is 5"),
        ("config.json:future", True, "future is unknown"),
        ("config.json:backbone_cfg.project_to_dim", 1536, "backbone_cfg.project_to_dim is 1536"),
        ("config.json:backbone_cfg.select_layer", 4, "wants 4 language layers of width 32, but Eagle has 3"),
        ("config.json:backbone_cfg.select_layer", -1, "backbone_cfg.select_layer is -1"),
        ("config.json:action_head_cfg.use_vlln", False, "action_head_cfg.use_vlln is False"),
        ("config.json:action_head_cfg.max_seq_len", 4, "action_horizon 5 exceeds max_seq_len 4"),
        ("config.json:action_head_cfg.input_embedding_dim", 32, "the width of diffusion_model_cfg is 24"),
        ("config.json:action_head_cfg.diffusion_model_cfg.norm_type", "layer_norm", "norm_type is 'layer_norm'"),
        ("config.json:action_head_cfg.diffusion_model_cfg.attention_bias", False, "attention_bias is unknown"),
        ("config.json:action_head_cfg.vl_self_attention_cfg.num_layers", "2", "num_layers is '2'"),
        ("eagle/config.json:use_pixel_shuffle", True, "use_pixel_shuffle is True"),
        ("eagle/config.json:mlp_connector_layers", 2, "mlp_connector_layers is 2"),
        ("eagle/config.json:text_config.hidden_size", 64, "of width 32, but Eagle has 3 of width 64"),
        ("eagle/config.json:text_config.rope_theta", None, "text_config.rope_theta is missing"),
        ("eagle/config.json:vision_config.patch_size", 13, "patch_size 13 does not divide image_size 28"),
    ],
)
def test_what_is_not_supported_is_refused(setting: str, value: Any, reason: str, tmp_path: Path) -> None:
    directory = save(tmp_path / "small", (setting, value))
    with pytest.raises(CheckpointError) as refusal:
        Architecture.read(directory)
    assert reason in str(refusal.value)
    assert "config.json" in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "is missing"), ("{", "is not JSON"), ("[]", "no JSON object")]
)
def test_a_damaged_configuration_is_refused(content: str | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        Architecture.read(tmp_path)


def test_padding_does_not_change_actions(model: GrootN15, inputs: Inputs, noise: Tensor) -> None:
    ids, mask = inputs.input_ids[1], inputs.attention_mask[1]
    sample = partial(model.sample_actions, noise=noise[1:])
    with torch.no_grad():
        batched = model.sample_actions(inputs, noise)[1:]
        alone = sample(second(inputs, ids[mask], mask[mask]))
        at_the_right = sample(second(inputs, ids.roll(-3), mask.roll(-3)))
        of_other_words = sample(second(inputs, ids.where(mask, 17), mask))
    for padded in (batched, at_the_right, of_other_words):
        torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pixel_values", "input_ids", "state", "embodiment_id", "noise"])
def test_every_input_matters(name: str, model: GrootN15, inputs: Inputs, noise: Tensor) -> None:
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "input_ids": lambda ids: torch.cat([ids[:, :-1], 20 - ids[:, -1:] % 20], dim=1),
        "embodiment_id": lambda embodiment: 2 - embodiment,
    }
    change = changes.get(name, lambda values: values * 0.9)
    with torch.no_grad():
        before = model.sample_actions(inputs, noise)
        if name == "noise":
            after = model.sample_actions(inputs, change(noise))
        else:
            after = model.sample_actions(replace(inputs, **{name: change(getattr(inputs, name))}), noise)
    assert ((before - after).abs().amax(dim=(1, 2)) > 1e-4).all()


def test_an_embodiment_reads_its_own_weights_only(model: GrootN15, inputs: Inputs, noise: Tensor) -> None:
    with torch.no_grad():
        before = model.sample_actions(inputs, noise)
        for name, parameter in model.named_parameters():
            if name.endswith((".W", ".b")):
                parameter[1] = torch.nan
        assert torch.equal(model.sample_actions(inputs, noise), before)
        third = model.sample_actions(replace(inputs, embodiment_id=torch.tensor([2, 1])), noise)
    assert torch.equal(third[0], before[0])
    assert third[1].isnan().all()


def test_every_layer_is_called_as_often_as_it_should_be(model: GrootN15, inputs: Inputs, noise: Tensor) -> None:
    calls: Counter[str] = Counter()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    with torch.no_grad():
        model.sample_actions(inputs, noise)
    for name in linears:
        if "lm_head" in name or "vision_model.head.attention" in name:  # unused; called inside torch
            assert calls[name] == 0, name
        else:
            assert calls[name] == (4 if name.startswith("action_head.model.") else 1), name


def test_the_number_of_steps_is_a_setting(model: GrootN15, inputs: Inputs, noise: Tensor) -> None:
    buckets: list[Tensor] = []
    model.action_head.model.register_forward_pre_hook(lambda module, arguments: buckets.append(arguments[1]))
    model.action_head.denoising_steps = 3
    with torch.no_grad():
        model.sample_actions(inputs, noise)
    assert [bucket.tolist() for bucket in buckets] == [[0, 0], [333, 333], [666, 666]]


def test_steps_are_looked_up_on_the_instance_and_summed(model: GrootN15, inputs: Inputs, noise: Tensor) -> None:
    steps: list[int] = []

    def constant(*, actions: Tensor, step: int, condition: Any) -> Tensor:
        steps.append(step)
        return torch.ones_like(actions)

    model.action_head.denoise_step = constant
    torch.testing.assert_close(model.sample_actions(inputs, noise), noise + 1)
    assert steps == [0, 1, 2, 3]


def test_attention_is_that_of_torch(inputs: Inputs) -> None:
    attention = Attention(width=12, heads=3, context_width=8)
    x, context = torch.randn(2, 4, 12), torch.randn(2, 15, 8)
    query, key, value = attention.to_q(x), attention.to_k(context), attention.to_v(context)
    split = [projected.view(2, -1, 3, 4).transpose(1, 2) for projected in (query, key, value)]
    expected = nn.functional.scaled_dot_product_attention(*split, attn_mask=inputs.attention_mask[:, None, None])
    expected = attention.to_out[0](expected.transpose(1, 2).reshape(2, 4, 12))
    output, weights = attention(x, context, inputs.attention_mask)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4))
    assert not weights[1, :, :, :3].any()


def test_gradients_reach_images_words_and_state(model: GrootN15, inputs: Inputs, noise: Tensor) -> None:
    pixels, state = inputs.pixel_values.requires_grad_(), inputs.state.requires_grad_()
    model.sample_actions(inputs, noise).sum().backward()
    words = model.backbone.eagle_model.language_model.get_input_embeddings().weight
    for source in (pixels, state, words):
        assert source.grad is not None
        assert source.grad.abs().sum() > 0


def test_released_dtypes(architecture: Architecture, model: GrootN15, inputs: Inputs, noise: Tensor) -> None:
    released = GrootN15(architecture).eval()
    released.load_state_dict(model.state_dict())
    assert released.backbone.eagle_model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        exact, actions = model.sample_actions(inputs, noise), released.sample_actions(inputs, noise)
    assert actions.dtype == torch.float32
    assert (actions - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"embodiment_id": torch.tensor([0, 3])}, r"embodiment_id is \[0, 3\]; the model knows 0 to 2"),
        ({"embodiment_id": torch.tensor([-1, 0])}, "the model knows 0 to 2"),
        ({"state": torch.zeros(2, 1, 4)}, r"state has shape \[2, 1, 4\] instead of \[2, T, 6\]"),
        ({"pixel_values": torch.zeros(3, 3, 28, 28)}, "hold 16 image tokens, but 3 images make 12"),
    ],
)
def test_inputs_that_do_not_fit(
    change: dict[str, Tensor], reason: str, model: GrootN15, inputs: Inputs, noise: Tensor
) -> None:
    with pytest.raises(ValueError, match=reason):
        model.sample_actions(replace(inputs, **change), noise)


def test_noise_that_does_not_fit(model: GrootN15, inputs: Inputs, noise: Tensor) -> None:
    with pytest.raises(ValueError, match=r"noise has shape \[2, 5, 2\] instead of \[2, 5, 3\]"):
        model.sample_actions(inputs, noise[..., :2])
