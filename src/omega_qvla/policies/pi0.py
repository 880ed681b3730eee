"""pi0 in lerobot's implementation: the state is a token of the action expert, and the denoising time is mixed into
the noisy actions before it."""

from __future__ import annotations

from collections.abc import Mapping

from omega_qvla.policies.paligemma_with_expert import KEPT, PaliGemmaWithExpert


class PI0(PaliGemmaWithExpert):
    """A pi0 policy, in floating point or quantized."""

    family = "pi0"
    kept: Mapping[str, str] = KEPT | {
        r"model\.state_proj$": "carries the state itself; small and sensitive",
        r"model\.action_time_mlp_(in|out)$": "mixes the denoising time into the actions; small and sensitive",
    }
