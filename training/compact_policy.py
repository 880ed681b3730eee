"""The compact pi0.5: its sizes, its tokenizer, its processors, and an initialization that can learn.

The prompt is pi0.5's own, `Task: <sentence>, State: <bin> <bin> <bin> <bin>;\\nAction: `. A word is a token, and
each proprioceptive dimension has its own 257 tokens: a table of 1,028 numbers learns faster than digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi05 import PI05Config, PI05Policy
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from omega_qvla.evaluation.metaworld.task import ACTION_DIM, CAMERAS, IMAGE_SIZE, TASKS
from omega_qvla.policies.paligemma_architecture import Architecture, GemmaSize, VisionSize, build

CHUNK = 8
STATE_DIM = 4
STATE_BINS = 257  # 0..255, and -1 for values below the range
TOKENIZER_LENGTH = 16
# The four places of the state in the prompt, told apart by what surrounds the number.
STATE_TOKEN_FORMS = ("State: {} ", "{} ", "{}", "{};")
STATE_PATTERN = r"State: -?\d+ |-?\d+ (?=-?\d+ -?\d+;)|-?\d+(?= -?\d+;)|-?\d+;|[^\s,]+"


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for MT10's sentences and the binned state."""
    words = sorted({word for sentence in TASKS.values() for word in sentence.split()})
    vocabulary = ["<pad>", "<unk>", "Task:", "Action:", *words]
    for form in STATE_TOKEN_FORMS:
        vocabulary += [form.format(value) for value in range(-1, STATE_BINS - 1)]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(STATE_PATTERN), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>")


def architecture() -> Architecture:
    stack = GemmaSize(width=128, depth=4, mlp_dim=512, num_heads=8, num_kv_heads=1, head_dim=16)
    return Architecture(
        vision=VisionSize(width=128, depth=4, mlp_dim=512, num_heads=4, patch_size=16),
        language=stack,
        expert=stack,
        vocabulary=len(tokenizer()),
    )


def config() -> PI05Config:
    features = {
        f"observation.images.{camera}": PolicyFeature(FeatureType.VISUAL, (3, IMAGE_SIZE, IMAGE_SIZE))
        for camera in CAMERAS
    }
    features["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE_DIM,))
    return PI05Config(
        device="cpu",
        dtype="float32",
        image_resolution=(IMAGE_SIZE, IMAGE_SIZE),
        chunk_size=CHUNK,
        n_action_steps=CHUNK // 2,
        max_action_dim=ACTION_DIM,
        max_state_dim=STATE_DIM,
        num_inference_steps=10,
        tokenizer_max_length=TOKENIZER_LENGTH,
        input_features=features,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
    )


def initialize(seed: int) -> PI05Policy:
    """A compact pi0.5 ready to be trained from nothing.

    lerobot only ever fine-tunes: as constructed, the adaRMS gates are closed, embeddings are far too large
    for a model without pretraining, and neighbouring state bins have unrelated embeddings.
    """
    torch.manual_seed(seed)
    policy = build(config(), architecture())
    stacks = policy.model.paligemma_with_expert
    width = architecture().expert.width
    with torch.no_grad():
        for name, module in stacks.gemma_expert.named_modules():
            if name.endswith("norm") and module.dense is not None:
                module.dense.weight.zero_()
                module.dense.bias.zero_()
                module.dense.bias[2 * width :] = 1.0
        embedding = stacks.paligemma.model.language_model.embed_tokens.weight
        embedding.normal_(0, 0.06)
        position = torch.linspace(-1, 1, STATE_BINS)[:, None]
        first = len(embedding) - STATE_DIM * STATE_BINS
        for table in embedding[first:].split(STATE_BINS):
            frequency, phase = torch.randn(1, width) * 3, torch.rand(1, width) * 2 * torch.pi
            table.copy_(torch.cos(position * frequency + phase) * 0.06 * 2**0.5)
    return policy


def save(policy: PI05Policy, state_quantiles: torch.Tensor, out: Path) -> None:
    """Write a lerobot checkpoint: weights in bfloat16, processors and tokenizer.

    `state_quantiles` [2, STATE_DIM]: the state's 1 % and 99 % quantiles. Actions are already in [-1, 1].
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(out / "tokenizer")
    statistics = {
        "observation.state": {"q01": state_quantiles[0], "q99": state_quantiles[1]},
        "action": {"q01": -torch.ones(ACTION_DIM), "q99": torch.ones(ACTION_DIM)},
    }
    preprocessor, postprocessor = processors(policy.config, statistics)
    preprocessor.save_pretrained(out)
    postprocessor.save_pretrained(out)
    architecture().write(out)
    policy.to(torch.bfloat16).save_pretrained(out)


def processors(config: PI05Config, statistics: dict[str, dict[str, torch.Tensor]]) -> tuple[Any, Any]:
    """lerobot's pi0.5 processors with our tokenizer in place of the one that they fetch from a hub."""
    steps = make_default_policy_processor_steps(config, statistics)
    before = [
        steps.rename_observations,
        steps.add_batch_dim,
        steps.normalize,
        Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim),
        TokenizerProcessorStep(tokenizer=tokenizer(), max_length=config.tokenizer_max_length),
        steps.to_device,
    ]
    return make_policy_processor_pipelines(input_steps=before, output_steps=[steps.unnormalize, steps.to_cpu])
