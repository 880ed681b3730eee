"""GR00T N1.5 (NVIDIA 2025, arXiv 2503.14734): a vision-language model and an action head.

Written anew, because lerobot has dropped this version. Parameters have the names and shapes of NVIDIA's checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla.policies.groot_n15.action_head import ActionHead
from omega_qvla.policies.groot_n15.architecture import Architecture
from omega_qvla.policies.groot_n15.vision_language import Backbone


@dataclass(frozen=True)
class Inputs:
    """B observations, as the model reads them."""

    pixel_values: Tensor
    """Floating point [images, 3, H, W] between -1 and 1, all images of the first observation first"""
    input_ids: Tensor
    """int64 [B, L], with one image token for each image patch"""
    attention_mask: Tensor
    """bool [B, L], False for padding"""
    state: Tensor
    """Normalized, padded with zeros: floating point [B, T, state dimension]"""
    embodiment_id: Tensor
    """int64 [B]"""


class GrootN15(nn.Module):
    """A GR00T N1.5 with freshly initialized weights: the backbone in `backbone_dtype`, the action head in float32.

    Each half computes in the dtype of its parameters. NVIDIA's and lerobot's policies call theirs under
    `torch.autocast` in bfloat16; this one can be called so, too.
    """

    def __init__(self, architecture: Architecture, backbone_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.architecture = architecture
        self.backbone = Backbone(architecture, backbone_dtype)
        self.action_head = ActionHead(architecture.action_head)

    def sample_actions(self, inputs: Inputs, noise: Tensor) -> Tensor:
        """Normalized actions [B, horizon, action dimension] from noise of this shape, in the action head's dtype.

        Padding has no influence: an observation's actions are the same alone and in a batch, up to rounding.
        Gradients are recorded unless the caller turns them off.

        Raises `ValueError` if noise, state, embodiment or image tokens do not fit.
        """
        self._check(inputs, noise)
        mask = inputs.attention_mask.bool()
        features = self.backbone(inputs.pixel_values, inputs.input_ids, mask)
        condition = self.action_head.condition(features, mask, inputs.state, inputs.embodiment_id)
        return self.action_head.sample(condition, noise)

    def _check(self, inputs: Inputs, noise: Tensor) -> None:
        size, batch = self.architecture.action_head, len(inputs.input_ids)
        expected = [batch, size.action_horizon, size.action_dim]
        if list(noise.shape) != expected:
            raise ValueError(f"noise has shape {list(noise.shape)} instead of {expected}")
        if inputs.state.ndim != 3 or inputs.state.shape[::2] != (batch, size.max_state_dim):
            raise ValueError(
                f"state has shape {list(inputs.state.shape)} instead of [{batch}, T, {size.max_state_dim}]; "
                "pad it with zeros"
            )
        known = size.max_num_embodiments
        if not ((inputs.embodiment_id >= 0) & (inputs.embodiment_id < known)).all():
            raise ValueError(f"embodiment_id is {inputs.embodiment_id.tolist()}; the model knows 0 to {known - 1}")
