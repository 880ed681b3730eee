"""pi0.5 in lerobot's implementation: the state is part of the prompt, and the denoising time modulates the norms
of the action expert."""

from __future__ import annotations

from collections.abc import Mapping

from omega_qvla.policies.lerobot_policy import WEIGHTS_FILE
from omega_qvla.policies.paligemma_with_expert import PaliGemmaWithExpert

__all__ = ["PI05", "WEIGHTS_FILE"]


class PI05(PaliGemmaWithExpert):
    """A pi0.5 policy, in floating point or quantized."""

    family = "pi05"
    kept: Mapping[str, str] = {
        r"norm\.dense$": "modulates a norm from the denoising time; its output is a scale, shift and gate",
        r"multi_modal_projector": "the projector between vision and language; small and sensitive",
        r"lm_head$": "not used to infer actions",
        r"model\.action_(in|out)_proj$": "carries the actions themselves; small and sensitive",
        r"model\.time_mlp_(in|out)$": "embeds the denoising time; small and sensitive",
    }
