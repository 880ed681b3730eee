"""pi0.5 in lerobot's implementation: the state is part of the prompt, and the denoising time modulates the norms
of the action expert."""

from __future__ import annotations

from collections.abc import Mapping

from omega_qvla.policies.paligemma_with_expert import KEPT, PaliGemmaWithExpert


class PI05(PaliGemmaWithExpert):
    """A pi0.5 policy, in floating point or quantized."""

    family = "pi05"
    kept: Mapping[str, str] = KEPT | {
        r"norm\.dense$": "modulates a norm from the denoising time; its output is a scale, shift and gate",
        r"model\.time_mlp_(in|out)$": "embeds the denoising time; small and sensitive",
    }
    of_the_step = r"norm\.dense$|model\.time_mlp_(in|out)$"
