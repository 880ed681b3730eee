"""A pi0.5 with lerobot's own code and processors that is small enough for every test, and what it sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi05 import PI05Config, PI05Policy
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from omega_qvla.policies.pi05_architecture import Architecture, GemmaSize, VisionSize, build
from omega_qvla.policy import Observation

CAMERAS = ("back", "front")
STATE_DIM = ACTION_DIM = 4
CHUNK = 4
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

    def config(self) -> PI05Config:
        shape = (3, self.image, self.image)
        features = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, shape) for name in CAMERAS}
        features["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE_DIM,))
        return PI05Config(
            device="cpu",
            dtype="float32",
            image_resolution=(self.image, self.image),
            chunk_size=CHUNK,
            n_action_steps=2,
            max_action_dim=ACTION_DIM + 2,
            max_state_dim=STATE_DIM,
            num_inference_steps=10,
            tokenizer_max_length=32,
            input_features=features,
            output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        )


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


def initialize(size: Size, seed: int) -> PI05Policy:
    """Random weights with which every layer matters: lerobot starts with closed gates and tiny weights."""
    torch.manual_seed(seed)
    policy = build(size.config(), size.architecture())
    with torch.no_grad():
        for name, module in policy.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
            if name.endswith("norm.dense"):
                module.weight.mul_(0.3)
                module.bias.normal_(0, 0.1)
                module.bias[2 * size.width :] += 1.0
    return policy


def save(policy: PI05Policy, size: Size, out: Path) -> None:
    """A lerobot checkpoint directory: bfloat16 weights, processors, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(out / "tokenizer")
    quantiles = {"q01": -torch.ones(STATE_DIM), "q99": torch.ones(STATE_DIM)}
    scales = torch.tensor([0.5, 1.0, 2.0, 4.0])
    statistics = {"observation.state": quantiles, "action": {"q01": -scales, "q99": scales}}
    steps = make_default_policy_processor_steps(policy.config, statistics)
    before = [
        steps.rename_observations,
        steps.add_batch_dim,
        steps.normalize,
        Pi05PrepareStateTokenizerProcessorStep(max_state_dim=STATE_DIM),
        TokenizerProcessorStep(tokenizer=tokenizer(), max_length=policy.config.tokenizer_max_length),
        steps.to_device,
    ]
    after = [steps.unnormalize, steps.to_cpu]
    for pipeline in make_policy_processor_pipelines(input_steps=before, output_steps=after):
        pipeline.save_pretrained(out)
    size.architecture().write(out)
    policy.to(torch.bfloat16).save_pretrained(out)


def random_observations(count: int, seed: int, image: int = 96) -> Observation:
    generator = np.random.default_rng(seed)
    images = {camera: generator.integers(0, 256, (count, image, image, 3), dtype=np.uint8) for camera in CAMERAS}
    state = generator.uniform(-1, 1, (count, STATE_DIM)).astype(np.float32)
    return Observation(images, state, tuple(INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(count)))


def random_noise(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, CHUNK, ACTION_DIM + 2, generator=generator)
