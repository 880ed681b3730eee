"""What pi0 and pi0.5 have in common.

Anatomy: a SigLIP tower sees each camera once; the Gemma language model reads image and prompt tokens once and
leaves its keys and values; the Gemma action expert denoises a chunk of actions in several steps, attending to
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy

from omega_qvla.policies.anatomy import ATTENTION_AND_GATED_MLP, VISION_ATTENTION_AND_MLP, Block, stack
from omega_qvla.policies.lerobot_policy import LerobotPolicy
from omega_qvla.policies.paligemma_architecture import ARCHITECTURE_FILE, Architecture, build
from omega_qvla.policy import Attention

_STACKS = "model.paligemma_with_expert"
_PALIGEMMA = f"{_STACKS}.paligemma"
_VISION = f"{_PALIGEMMA}.model.vision_tower.vision_model.encoder.layers"
_LANGUAGE = f"{_PALIGEMMA}.model.language_model.layers"
_EXPERT = f"{_STACKS}.gemma_expert.model.layers"

KEPT = {
    r"multi_modal_projector": "the projector between vision and language; small and sensitive",
    r"lm_head$": "not used to infer actions",
    r"model\.action_(in|out)_proj$": "carries the actions themselves; small and sensitive",
}
"""Why linears that both have stay in floating point."""


class PaliGemmaWithExpert(LerobotPolicy):
    """The policies built on lerobot's `PaliGemmaWithExpertModel`."""

    files = (*LerobotPolicy.files, ARCHITECTURE_FILE)
    copies: Mapping[str, str] = {  # as lerobot's own loader has it
        f"{_PALIGEMMA}.model.language_model.embed_tokens.weight": f"{_PALIGEMMA}.lm_head.weight"
    }

    @classmethod
    def build(cls, config: PreTrainedConfig, directory: Path) -> PreTrainedPolicy:
        return build(config, Architecture.read(directory))

    def blocks(self) -> list[Block]:
        return [
            *stack(self.module, "vision", _VISION, VISION_ATTENTION_AND_MLP),
            *stack(self.module, "language", _LANGUAGE, ATTENTION_AND_GATED_MLP),
            *stack(self.module, "action", _EXPERT, ATTENTION_AND_GATED_MLP),
        ]

    def attentions(self) -> list[Attention]:
        found = []
        for block in self.blocks():
            if block.part != "vision":
                name = f"{block.name}.self_attn"
                heads = self.module.get_submodule(name).config.num_attention_heads
                found.append(Attention(name, block.part, f"{name}.q_proj", f"{name}.o_proj", heads))
        return found
