"""Policies with lerobot's own code and processors that are small enough for every test, and what they see.

The rooms share a pi0.5; the other families are for the tests of their adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi0 import PI0Config, PI0Policy
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.policies.pi05 import PI05Config, PI05Policy
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.policies.smolvla import SmolVLAConfig, SmolVLAPolicy
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    NewLineTaskProcessorStep,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from omega_qvla.policies.paligemma_architecture import Architecture, GemmaSize, VisionSize, build
from omega_qvla.policy import Observation

CAMERAS = ("back", "front")
STATE_DIM = ACTION_DIM = 4
CHUNK = 4
SCALES = (0.5, 1.0, 2.0, 4.0)
"""Of the actions: what a normalized 1 stands for."""
INSTRUCTIONS = ("reach a goal", "open the door", "push the puck", "close the drawer")


@dataclass(frozen=True)
class Size:
    """What differs between the policies of the tests."""

    width: int = 128
    depth: int = 2
    mlp_dim: int = 128
    image: int = 96
    patch: int = 32

    def architecture(self) -> Architecture:
        stack = GemmaSize(self.width, self.depth, self.mlp_dim, num_heads=8, num_kv_heads=1, head_dim=16)
        vision = VisionSize(self.width, depth=1, mlp_dim=self.width, num_heads=4, patch_size=self.patch)
        return Architecture(vision, stack, stack, len(tokenizer()))

    def config(self, kind: type[PI05Config] | type[PI0Config] = PI05Config) -> PI05Config | PI0Config:
        return kind(
            **settings(self.image),
            dtype="float32",
            image_resolution=(self.image, self.image),
            num_inference_steps=10,
        )


def settings(image: int) -> dict[str, Any]:
    """What the configurations of all families say."""
    shape = (3, image, image)
    features = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, shape) for name in CAMERAS}
    features["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE_DIM,))
    return {
        "device": "cpu",
        "chunk_size": CHUNK,
        "n_action_steps": 2,
        "max_action_dim": ACTION_DIM + 2,
        "max_state_dim": STATE_DIM,
        "tokenizer_max_length": 32,
        "input_features": features,
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
    }


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of the instructions, and every digit and punctuation mark for itself."""
    words = sorted({word for sentence in INSTRUCTIONS for word in sentence.split()})
    vocabulary = ["<pad>", "<unk>", "Task", "State", "Action", *",:;-", *"0123456789", *words]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>")


def initialize(
    size: Size, seed: int, kind: type[PI05Config] | type[PI0Config] = PI05Config
) -> PI05Policy | PI0Policy:
    torch.manual_seed(seed)
    policy = build(size.config(kind), size.architecture())
    randomize(policy)
    return policy


@torch.no_grad()
def randomize(policy: torch.nn.Module) -> None:
    """Random weights with which every layer matters: lerobot starts with closed gates and tiny weights."""
    for name, module in policy.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.normal_(0, module.in_features**-0.5)
        if name.endswith("norm.dense"):
            module.weight.mul_(0.3)
            module.bias.normal_(0, 0.1)
            module.bias[2 * module.out_features // 3 :] += 1.0


def save(policy: PI05Policy | PI0Policy, size: Size, out: Path) -> None:
    """A lerobot checkpoint directory: bfloat16 weights, processors, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(out / "tokenizer")
    save_processors(policy.config, out)
    size.architecture().write(out)
    policy.to(torch.bfloat16).save_pretrained(out)


def save_processors(config: PreTrainedConfig, out: Path) -> None:
    """The steps of lerobot's own processors, with our tokenizer in place of one from a hub."""
    steps = make_default_policy_processor_steps(config, statistics(config))
    tokenize = TokenizerProcessorStep(tokenizer=tokenizer(), max_length=config.tokenizer_max_length)
    start, end = [steps.rename_observations, steps.add_batch_dim], [steps.unnormalize, steps.to_cpu]
    if isinstance(config, PI05Config):
        prepare_state = Pi05PrepareStateTokenizerProcessorStep(max_state_dim=STATE_DIM)
        before, after = [*start, steps.normalize, prepare_state, tokenize, steps.to_device], end
    elif isinstance(config, PI0Config):
        relative = RelativeActionsProcessorStep(enabled=config.use_relative_actions)
        absolute = AbsoluteActionsProcessorStep(enabled=config.use_relative_actions, relative_step=relative)
        before = [*start, Pi0NewLineProcessor(), tokenize, steps.to_device, relative, steps.normalize]
        after = [steps.unnormalize, absolute, steps.to_cpu]
    else:
        before, after = [*start, NewLineTaskProcessorStep(), tokenize, steps.to_device, steps.normalize], end
    for pipeline in make_policy_processor_pipelines(input_steps=before, output_steps=after):
        pipeline.save_pretrained(out)


def statistics(config: PreTrainedConfig) -> dict[str, dict[str, torch.Tensor]]:
    """With which states stay as they are and actions are multiplied by SCALES."""
    ones, scales = torch.ones(STATE_DIM), torch.tensor(SCALES)
    if isinstance(config, PI05Config):
        return {"observation.state": {"q01": -ones, "q99": ones}, "action": {"q01": -scales, "q99": scales}}
    zeros = torch.zeros(STATE_DIM)
    return {"observation.state": {"mean": zeros, "std": ones}, "action": {"mean": zeros, "std": scales}}


def save_vlm(out: Path, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> None:
    """What lies in a SmolVLM's hub repository besides weights; by default, of a tiny one."""
    special = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer()._tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=special,
    )
    tiny_text = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8}
    tiny_text |= {"num_key_value_heads": 8, "head_dim": 16, "vocab_size": len(words), "dtype": "float32"}
    tiny_vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    tiny_vision |= {"image_size": 32, "patch_size": 8}
    SmolVLMConfig(
        text_config={"model_type": "llama", **(text or tiny_text)},
        vision_config=vision or tiny_vision,
        scale_factor=2,
        image_token_id=words.image_token_id,
        pad_token_id=words.pad_token_id,
    ).save_pretrained(out)
    processor = SmolVLMProcessor(SmolVLMImageProcessor(), words, SmolVLMVideoProcessor(), chat_template="none")
    processor.save_pretrained(out)


def save_smolvla(out: Path, seed: int, **changes: Any) -> None:
    """A SmolVLA checkpoint with two language layers, of which the expert joins the first and reads the second.

    `changes` are of its configuration. The VLM's files lie in `vlm`.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(out / "tokenizer")
    save_vlm(out / "vlm")
    config = SmolVLAConfig(
        **settings(32)
        | {"num_steps": 10, "num_vlm_layers": 2, "expert_width_multiplier": 0.5, "resize_imgs_with_padding": (32, 32)}
        | changes
        | {"vlm_model_name": str(out / "vlm")}
    )
    torch.manual_seed(seed)
    policy = SmolVLAPolicy(config)
    randomize(policy)
    save_processors(config, out)
    config.vlm_model_name = SmolVLAConfig.vlm_model_name
    policy.to(torch.bfloat16).save_pretrained(out)


FAMILIES = ("pi05", "pi0", "smolvla")


def save_family(family: str, out: Path) -> None:
    """A checkpoint of any family, whose observations and noise have the same shapes."""
    if family == "smolvla":
        save_smolvla(out, seed=0)
    else:
        size = Size()
        save(initialize(size, 0, PI05Config if family == "pi05" else PI0Config), size, out)


def random_observations(count: int, seed: int, image: int = 96) -> Observation:
    generator = np.random.default_rng(seed)
    images = {camera: generator.integers(0, 256, (count, image, image, 3), dtype=np.uint8) for camera in CAMERAS}
    state = generator.uniform(-1, 1, (count, STATE_DIM)).astype(np.float32)
    return Observation(images, state, tuple(INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(count)))


def random_noise(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, CHUNK, ACTION_DIM + 2, generator=generator)
