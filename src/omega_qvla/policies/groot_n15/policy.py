"""GR00T N1.5 as a policy that can be quantized.

Anatomy: a SigLIP tower sees each camera once; the first layers of a Qwen3 read image and prompt tokens once; a small
self-attention stack refines what they found. The diffusion transformer denoises a chunk of actions in several steps:
its even layers attend to these features, so that queries are made from one input, keys and values from another, its
odd layers to state and actions alone.

The attention of the diffusion transformer is offered for correction. That of the language model is not: Qwen3
normalizes queries after their projection, which takes a factor on them out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from omega_qvla.policies.anatomy import (
    ATTENTION_AND_GATED_MLP,
    CROSS_ATTENTION,
    GROOT_ACTION_HEAD_KEPT,
    GROOT_ACTION_HEAD_OF_THE_STEP,
    SELF_ATTENTION,
    VISION_ATTENTION_AND_MLP,
    Block,
    depth,
    stack,
)
from omega_qvla.policies.base import AdaptedPolicy
from omega_qvla.policies.groot_n15.action_head import Condition
from omega_qvla.policies.groot_n15.architecture import BASE_FILE, CONFIG_FILE
from omega_qvla.policies.groot_n15.model import GrootN15
from omega_qvla.policies.groot_n15.nvidia_layout import CHOICES_FILE, METADATA_FILE
from omega_qvla.policies.groot_n15.processing import Processing, read_architecture
from omega_qvla.policies.groot_n15.prompt import EAGLE_DIRECTORY
from omega_qvla.policy import Attention, Interface, Observation

_EAGLE = "backbone.eagle_model"
_VISION = f"{_EAGLE}.vision_model.vision_model.encoder.layers"
_LANGUAGE = f"{_EAGLE}.language_model.model.layers"
_ACTION = "action_head.model.transformer_blocks"
_HEAD, _EMBEDDING = f"{_EAGLE}.language_model.lm_head.weight", f"{_EAGLE}.language_model.model.embed_tokens.weight"


class GrootN15Policy(AdaptedPolicy):
    """A GR00T N1.5 policy, in floating point or quantized, from a checkpoint of NVIDIA or of lerobot 0.5.1.

    The backbone runs in bfloat16 and the action head in float32. The originals' autocast is left out: it would round
    what quantized layers and statistics compute inside to bfloat16.
    """

    module: GrootN15
    family = "groot_n15"
    files = (
        CONFIG_FILE,
        BASE_FILE,
        CHOICES_FILE,
        METADATA_FILE,
        "policy_*",
        *(f"{EAGLE_DIRECTORY}/*.{kind}" for kind in ("json", "txt", "jinja")),
    )
    copies: Mapping[str, str] = {_HEAD: _EMBEDDING, _EMBEDDING: _HEAD}  # they are one, saved under either name
    of_the_step = GROOT_ACTION_HEAD_OF_THE_STEP
    kept: Mapping[str, str] = {
        r"vision_model\.head\.": "pools an image into one vector, which nothing reads",
        r"eagle_model\.mlp1\.": "projects vision to language; small and sensitive",
        r"lm_head$": "not used to infer actions",
        **GROOT_ACTION_HEAD_KEPT,
    }

    @classmethod
    def without_values(cls, directory: Path) -> GrootN15:
        architecture = read_architecture(directory)
        with init_empty_weights(include_buffers=False):
            return GrootN15(architecture)

    def __init__(self, module: GrootN15, directory: Path, label: str, execution: str) -> None:
        super().__init__(module, directory, label, execution)
        self._processing = Processing(directory, module.architecture)
        head = module.action_head
        self.noise_shape = head.action_horizon, head.action_dim
        self.execute_steps = self._processing.robot.execute_steps
        self._denoise_step = head.denoise_step
        head.denoise_step = self._step  # type: ignore[method-assign]  # where `sample` looks it up

    def steps(self, module: nn.Module) -> int:
        assert isinstance(module, GrootN15)
        return module.action_head.denoising_steps

    def blocks(self) -> list[Block]:
        return [
            *stack(self.module, "vision", _VISION, VISION_ATTENTION_AND_MLP),
            *stack(self.module, "language", _LANGUAGE, ATTENTION_AND_GATED_MLP),
            *self._action_blocks(),
        ]

    def interface(self) -> Interface:
        robot = self._processing.robot
        return Interface(
            cameras=dict.fromkeys(robot.cameras),
            state={name: part.width for name, part in robot.state.items()},
            actions={name: part.width for name, part in robot.actions.items()},
        )

    def action_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        parts = self._processing.robot.actions.values()
        if not all(part.limited for part in parts):
            return None
        one = torch.ones(1, 1, sum(part.width for part in parts))
        low, high = (self.physical(end).flatten().double().numpy() for end in (-one, one))
        return low, high

    def attentions(self) -> list[Attention]:
        heads = self.module.architecture.action_head.diffusion_model_cfg.num_attention_heads
        names = [f"{block.name}.attn1" for block in self._action_blocks()]
        return [Attention(name, "action", f"{name}.to_q", f"{name}.to_out.0", heads) for name in names]

    def sample(self, observation: Observation, noise: Tensor) -> Tensor:
        actions = self.module.sample_actions(self._processing.inputs(observation), noise)
        return actions[..., : self._processing.robot.action_width].float()

    def physical(self, actions: Tensor) -> Tensor:
        return self._processing.physical(actions)

    def _action_blocks(self) -> list[Block]:
        kinds = CROSS_ATTENTION, SELF_ATTENTION
        return [
            Block("action", f"{_ACTION}.{index}", kinds[index % 2]) for index in range(depth(self.module, _ACTION))
        ]

    def _step(self, *, actions: Tensor, step: int, condition: Condition) -> Tensor:
        self.partial.append(actions)
        with self.step.at(step):
            return self._denoise_step(actions=actions, step=step, condition=condition)
