#!/usr/bin/env python
r"""Compares this package's GR00T N1.5 with that of lerobot 0.5.1, the last release that has it, at a small size.

    python -m pip install --no-deps --target DIRECTORY \
        lerobot==0.5.1 transformers==5.3.0 diffusers==0.35.2 peft==0.21.2
    python scripts/compare_groot_n15.py DIRECTORY

Two releases of lerobot do not fit into one process: a second one imports lerobot from DIRECTORY, draws weights and
inputs, and writes them down with everything that it computes. Both models run with the same hooks, as their modules
have the same names. Exits with 1 if they differ by more than rounding in float32.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]

IMAGE_TOKEN, PATCHES, WORDS = 90, 4, 9
HORIZON, ACTION_DIM, STATE_DIM, EMBODIMENTS = 6, 5, 7, 3
LANGUAGE_LAYERS, KEPT_LAYERS = 5, 3
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}
TEXT = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LANGUAGE_LAYERS}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
DIFFUSION = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 4, "positional_embeddings": None}
DIFFUSION |= {"output_dim": 32, "cross_attention_dim": 64, "norm_type": "ada_norm", "interleave_self_attention": True}
SELF_ATTENTION = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "positional_embeddings": None}
HEAD = {
    "action_dim": ACTION_DIM,
    "action_horizon": HORIZON,
    "max_state_dim": STATE_DIM,
    "hidden_size": 32,
    "input_embedding_dim": 48,
    "backbone_embedding_dim": 64,
    "num_inference_timesteps": 4,
    "max_num_embodiments": EMBODIMENTS,
    "max_seq_len": 16,
    "num_target_vision_tokens": 3,
    "num_timestep_buckets": 1000,
    "add_pos_embed": True,
    "use_vlln": True,
}

ROPE_THETA = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="where lerobot 0.5.1 lies")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        save_file(reference(arguments.reference, arguments.device), arguments.write)
        return
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "reference.safetensors"
        command = [
            sys.executable,
            __file__,
            str(arguments.reference),
            "--device",
            arguments.device,
            "--write",
            str(file),
        ]
        environment = os.environ | {"PYTHONPATH": str(arguments.reference)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        theirs = load_file(file, device=arguments.device)
    sys.exit(report(theirs, ours(theirs)))


# What both processes do.


def draw_weights(model: nn.Module) -> None:
    """Gives every parameter values that follow from its name; in the backbone they are bfloat16 numbers."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        inputs = parameter.shape[-2 if parameter.ndim == 3 else -1] if parameter.ndim > 1 else 100
        values = torch.randn(parameter.shape, generator=generator) / inputs**0.5
        values += parameter.ndim == 1 and name.endswith("weight")  # a norm
        parameter.data = values.bfloat16().float() if name.startswith("backbone") else values


def batch() -> Tensors:
    """Two observations with two images each, of two embodiments."""
    generator = torch.Generator().manual_seed(1)
    images = torch.full((2, 2 * PATCHES), IMAGE_TOKEN)
    words = torch.randint(0, IMAGE_TOKEN, (2, WORDS), generator=generator)
    return {
        "pixel_values": torch.rand(4, 3, 28, 28, generator=generator) * 2 - 1,
        "input_ids": torch.cat([words[:, :3], images, words[:, 3:]], dim=1),
        "attention_mask": torch.ones(2, 2 * PATCHES + WORDS, dtype=torch.long),
        "state": torch.randn(2, 1, STATE_DIM, generator=generator),
        "embodiment_id": torch.tensor([2, 0]),
        "noise": torch.randn(2, HORIZON, ACTION_DIM, generator=generator),
    }


def row(data: Tensors, index: int) -> Tensors:
    """One observation of a batch, without padding."""
    count = data["attention_mask"][index].sum()
    one = {key: value[index : index + 1] for key, value in data.items() if key != "pixel_values"}
    for key in ("input_ids", "attention_mask"):
        one[key] = one[key][:, -count:]
    return one | {"pixel_values": data["pixel_values"][2 * index : 2 * index + 2]}


def padded(data: Tensors) -> Tensors:
    """The batch with the last four words of its second prompt missing, padded at the left."""
    ids, mask = data["input_ids"].clone(), data["attention_mask"].clone()
    ids[1] = ids[1].roll(4)
    ids[1, :4], mask[1, :4] = 0, 0
    return data | {"input_ids": ids, "attention_mask": mask}


@contextmanager
def recorded(model: nn.Module) -> Iterator[Tensors]:
    """What passes the joints of a model while open, by its place."""
    head, seen = model.action_head, {}

    def output(place: str, *, each_step: bool = False) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, result: Tensor) -> None:
            number = sum(key.startswith(place) for key in seen)
            seen[f"{place}, step {number}" if each_step else place] = result[:, -HORIZON:] if each_step else result

        return hook

    def first_input(place: str) -> Callable[..., None]:
        return lambda module, inputs: seen.update({place: inputs[0]})

    hooks = [
        model.backbone.eagle_model.mlp1.register_forward_hook(output("vision features")),
        head.vlln.register_forward_pre_hook(first_input("backbone features")),
        head.vl_self_attention.register_forward_hook(output("vl_self_attention")),
        head.state_encoder.register_forward_hook(output("state token")),
        head.action_encoder.register_forward_hook(output("action tokens", each_step=True)),
        head.model.register_forward_hook(output("diffusion transformer", each_step=True)),
        head.action_decoder.register_forward_hook(output("velocity", each_step=True)),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def record(case: str, model: nn.Module, sample: Callable[[], Tensor]) -> Tensors:
    with torch.no_grad(), recorded(model) as seen:
        seen["actions"] = sample()
    return {f"{case}: {place}": value.float().contiguous() for place, value in seen.items()}


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16)


# The process of lerobot 0.5.1.


def reference(directory: Path, device: str) -> Tensors:
    """Weights and everything that lerobot computes with them."""
    model = reference_model(directory).eval().to(device)
    data = {key: value.to(device) for key, value in batch().items()}

    def run(data: Tensors, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
        return lambda: reference_actions(model, data, dtype)

    both = padded(data)
    results = record("float32", model, run(data))
    results |= record("padded", model, run(both))
    for index in range(2):
        results |= record(f"alone {index}", model, run(row(both, index)))
    for parameter in model.backbone.parameters():  # its values are those of bfloat16 already
        parameter.data = parameter.data.bfloat16()
    with autocast(device):
        results |= record("autocast", model, run(data, torch.bfloat16))
    return results | {f"weights: {name}": value.clone() for name, value in model.state_dict().items()}


def reference_model(directory: Path) -> nn.Module:
    """lerobot's modules in float32, with drawn weights."""
    for name in ("lerobot.policies", "lerobot.policies.groot"):  # whose own import would need drivers of robots
        package = ModuleType(name)
        package.__path__ = [str(directory.joinpath(*name.split(".")))]
        sys.modules[name] = package
    from lerobot.policies.groot import groot_n1
    from lerobot.policies.groot.action_head.flow_matching_action_head import FlowmatchingActionHead
    from lerobot.policies.groot.eagle2_hg_model.configuration_eagle2_5_vl import Eagle25VLConfig
    from lerobot.policies.groot.eagle2_hg_model.modeling_eagle2_5_vl import Eagle25VLForConditionalGeneration
    from transformers import Qwen3ForCausalLM, SiglipVisionModel

    rope = {"rope_theta": ROPE_THETA, "rope_type": "default"}
    config = Eagle25VLConfig(
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        text_config=TEXT | {"architectures": ["Qwen3ForCausalLM"], "rope_parameters": rope},
        select_layer=-1,
        use_pixel_shuffle=False,
        mlp_connector_layers=1,
        image_token_index=IMAGE_TOKEN,
        _attn_implementation="sdpa",
    )

    def eagle(*_: Any, **__: Any) -> nn.Module:
        parts = SiglipVisionModel(config.vision_config), Qwen3ForCausalLM(config.text_config)
        return Eagle25VLForConditionalGeneration(config, *parts)

    with (
        patch.object(groot_n1, "ensure_eagle_cache_ready"),
        patch.object(groot_n1.AutoConfig, "from_pretrained", return_value=config),
        patch.object(groot_n1.AutoModel, "from_config", eagle),
    ):
        backbone = groot_n1.EagleBackbone(select_layer=KEPT_LAYERS, project_to_dim=None)
    # Theirs is flash attention, which needs a GPU; these are the ones that this package uses.
    backbone.eagle_model.vision_model.set_attn_implementation("sdpa")
    backbone.eagle_model.language_model.set_attn_implementation("eager")
    transformers = {"diffusion_model_cfg": DIFFUSION, "vl_self_attention_cfg": SELF_ATTENTION}
    training = {"noise_beta_alpha": 1.5, "noise_beta_beta": 1.0, "tune_projector": True, "tune_diffusion_model": True}
    head = FlowmatchingActionHead(SimpleNamespace(**HEAD, **transformers, **training))
    model = nn.ModuleDict({"backbone": backbone, "action_head": head})
    draw_weights(model)
    return model


def reference_actions(model: nn.Module, data: Tensors, dtype: torch.dtype) -> Tensor:
    """As `GR00TN15.get_action` does it, with noise from outside; it casts all that is floating point to `dtype`."""
    data = {key: value.to(dtype) if value.is_floating_point() else value for key, value in data.items()}
    eagle = {f"eagle_{key}": data[key] for key in ("pixel_values", "input_ids", "attention_mask")}
    features = model.backbone(eagle | {"eagle_image_sizes": None})
    inputs = SimpleNamespace(state=data["state"], embodiment_id=data["embodiment_id"])
    with patch.object(torch, "randn", lambda **settings: data["noise"].to(settings["dtype"])):
        return model.action_head.get_action(features, inputs)["action_pred"]


# The process of this package.


def ours(theirs: Tensors) -> Tensors:
    """What this package computes with lerobot's weights."""
    from omega_qvla.policies.groot_n15 import GrootN15, Inputs

    prefix = "weights: "
    weights = {key.removeprefix(prefix): value for key, value in theirs.items() if key.startswith(prefix)}
    some = next(iter(weights.values()))
    data = {key: value.to(some.device) for key, value in batch().items()}

    def model(dtype: torch.dtype) -> GrootN15:
        made = GrootN15(architecture(), dtype).eval().to(some.device)
        made.load_state_dict(weights, strict=True)
        return made

    def run(model: GrootN15, data: Tensors) -> Callable[[], Tensor]:
        inputs = {key: value for key, value in data.items() if key != "noise"}
        return lambda: model.sample_actions(Inputs(**inputs), data["noise"])

    exact, released = model(torch.float32), model(torch.bfloat16)
    results = record("float32", exact, run(exact, data)) | record("padded", exact, run(exact, padded(data)))
    with autocast(some.device.type):
        results |= record("autocast", released, run(released, data))
    return results | record("released", released, run(released, data))


def architecture() -> Any:
    from omega_qvla.policies.groot_n15.architecture import (
        ActionHeadSize,
        Architecture,
        BackboneSize,
        DiffusionSize,
        EagleSize,
        LanguageSize,
        SelfAttentionSize,
        VisionSize,
    )

    language = LanguageSize(**TEXT, rope_theta=ROPE_THETA)
    transformers = {
        "diffusion_model_cfg": DiffusionSize(**DIFFUSION),
        "vl_self_attention_cfg": SelfAttentionSize(**SELF_ATTENTION),
    }
    return Architecture(
        EagleSize(VisionSize(**VISION), language, IMAGE_TOKEN),
        BackboneSize(KEPT_LAYERS),
        ActionHeadSize(**HEAD, **transformers),
    )


# The comparison.


def report(theirs: Tensors, ours: Tensors) -> int:
    """Prints the tables; 1 if float32 differs by more than rounding."""

    def difference(one: Tensor, other: Tensor) -> float:
        return float((one.float() - other.float()).abs().max())

    places = [key.removeprefix("float32: ") for key in ours if key.startswith("float32: ")]
    columns = "largest value", "float32", "autocast", "lerobot's autocast", "ours without autocast"
    print("Largest absolute differences: of ours from lerobot's in float32, and under autocast; then of lerobot's")
    print("autocast, and of ours in its released dtypes without autocast, from lerobot's float32.\n")
    print(f"| | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|")
    relative = 0.0
    for place in places:
        exact, cast = theirs[f"float32: {place}"], theirs[f"autocast: {place}"]
        peak, rounding = float(exact.abs().max()), difference(ours[f"float32: {place}"], exact)
        relative = max(relative, rounding / peak)
        others = difference(ours[f"autocast: {place}"], cast), difference(cast, exact)
        released = difference(ours[f"released: {place}"], exact)
        print(f"| {place} | {peak:.3g} | {rounding:.1e} | {others[0]:.1e} | {others[1]:.1e} | {released:.1e} |")
    alone = torch.cat([theirs[f"alone {index}: actions"] for index in range(2)])
    padding = difference(ours["padded: actions"], alone)
    print(f"\nlargest difference in float32, relative to the largest value: {relative:.1e}")
    print(f"a padded batch, from lerobot's observation by observation: ours {padding:.1e}, ", end="")
    print(f"lerobot's {difference(theirs['padded: actions'], alone):.1e}")
    print(f"lerobot's first and last actions: {theirs['float32: actions'][:, [0, -1]].tolist()}")
    return int(max(relative, padding / float(alone.abs().max())) > 1e-5)


if __name__ == "__main__":
    main()
