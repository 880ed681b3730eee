"""SmolVLA in lerobot's implementation.

Anatomy: a SigLIP tower sees each camera once; the first layers of a SmolVLM's language model read image, prompt and
state tokens once and leave their keys and values; the action expert denoises a chunk of actions in several steps.
Its layers attend by turns to both the cached and their own keys and values, and to the cached ones alone, which they
first project: there queries, keys and values are made from three inputs.

lerobot computes attention outside the attention modules and calls no block as a whole. So there is no attention to
correct, and no block whose output could be reconstructed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.smolvla import SmolVLAPolicy

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.anatomy import (
    ATTENTION_AND_GATED_MLP,
    CROSS_ATTENTION_AND_GATED_MLP,
    VISION_ATTENTION_AND_MLP,
    Block,
    depth,
    stack,
)
from omega_qvla.policies.lerobot_policy import LerobotPolicy

VLM_DIRECTORY = "vlm"
"""Configuration, processor and tokenizer of the VLM, as they lie in its hub repository."""
_STACKS = "model.vlm_with_expert"
_VISION = f"{_STACKS}.vlm.model.vision_model.encoder.layers"
_LANGUAGE = f"{_STACKS}.vlm.model.text_model.layers"
_EXPERT = f"{_STACKS}.lm_expert.layers"


class SmolVLA(LerobotPolicy):
    """A SmolVLA policy, in floating point or quantized.

    Its checkpoint names a VLM on the hub instead of stating the VLM's sizes. A directory `vlm` beside `config.json`
    is used instead of the hub.
    """

    family = "smolvla"
    steps_setting = "num_steps"
    files = (*LerobotPolicy.files, *(f"{VLM_DIRECTORY}/*.{kind}" for kind in ("json", "txt", "jinja")))
    kept: Mapping[str, str] = {
        r"vlm\.model\.connector": "the projector between vision and language; small and sensitive",
        r"lm_head$": "not used to infer actions",
        r"model\.state_proj$": "carries the state itself; small and sensitive",
        r"model\.action_(in|out)_proj$": "carries the actions themselves; small and sensitive",
        r"model\.action_time_mlp_(in|out)$": "mixes the denoising time into the actions; small and sensitive",
    }

    @classmethod
    def build(cls, config: PreTrainedConfig, directory: Path) -> PreTrainedPolicy:
        if config.adapt_to_pi_aloha:
            raise CheckpointError(
                f"{directory / 'config.json'}: adapt_to_pi_aloha is not supported, as the model then returns joint "
                "angles instead of normalized actions; convert states and actions outside the policy"
            )
        vlm, in_bfloat16 = config.vlm_model_name, config.load_vlm_weights
        if (directory / VLM_DIRECTORY).is_dir():
            config.vlm_model_name = str(directory / VLM_DIRECTORY)
        config.load_vlm_weights = False  # the checkpoint holds them all
        try:
            module = SmolVLAPolicy(config)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the VLM of {directory} cannot be built: {error}; put the .json, .jinja and .txt files of "
                f"{vlm} into {directory / VLM_DIRECTORY}"
            ) from error
        if in_bfloat16:  # lerobot loads the VLM's own weights in this dtype, and then those of the checkpoint into it
            module.model.vlm_with_expert.vlm.to(torch.bfloat16)
        return module

    def blocks(self) -> list[Block]:
        return [
            *stack(self.module, "vision", _VISION, VISION_ATTENTION_AND_MLP),
            *stack(self.module, "language", _LANGUAGE, ATTENTION_AND_GATED_MLP),
            *(self._expert_block(index) for index in range(depth(self.module, _EXPERT))),
        ]

    def _expert_block(self, index: int) -> Block:
        stacks = self.module.model.vlm_with_expert
        beside = index * (stacks.num_vlm_layers // stacks.num_expert_layers)  # the language layer that it attends to
        every = stacks.self_attn_every_n_layers
        joint = "cross" not in stacks.attention_mode or (every > 0 and beside % every == 0)
        inputs = ATTENTION_AND_GATED_MLP if joint else CROSS_ATTENTION_AND_GATED_MLP
        return Block("action", f"{_EXPERT}.{index}", inputs)
