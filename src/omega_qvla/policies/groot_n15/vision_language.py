"""Eagle 2.5 (Chen et al. 2025, arXiv 2504.15271) as GR00T N1.5 uses it: a SigLIP tower, one linear layer, and the
first layers of a Qwen3.

Only the hidden states after the last remaining layer are used. They pass through the final norm of the uncut language
model, as they did in training.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Qwen3Config, SiglipVisionConfig

from omega_qvla.policies.groot_n15.architecture import Architecture, EagleSize, LanguageSize


class Backbone(nn.Module):
    """What turns images and prompt into features for the action head."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        self.eagle_model = Eagle(architecture.eagle, architecture.backbone.select_layer, dtype)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `Eagle.forward`."""
        return self.eagle_model(pixel_values, input_ids, attention_mask)


class Eagle(nn.Module):
    """The vision-language model with the first `layers` layers of its language model, in `dtype`."""

    def __init__(self, size: EagleSize, layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.image_token = size.image_token_index
        vision, language = size.vision_config, size.text_config
        # `from_config` leaves buffers alone: the frequencies of the rotary embedding must stay float32.
        self.vision_model = AutoModel.from_config(SiglipVisionConfig(**asdict(vision)), dtype=dtype)
        self.mlp1 = nn.Sequential(nn.Linear(vision.hidden_size, language.hidden_size, dtype=dtype))
        # Eager, because only then an attention module returns its weights.
        self.language_model = AutoModelForCausalLM.from_config(
            _language_config(language, layers), dtype=dtype, attn_implementation="eager"
        )

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features [B, L, width] of B prompts with their images; those of padding mean nothing.

        `pixel_values` is floating point [images, 3, H, W] between -1 and 1, all images of the first prompt first;
        `input_ids` int64 [B, L], with one image token for each patch; `attention_mask` bool [B, L], False for
        padding.

        Raises `ValueError` if image tokens and images do not fit together.
        """
        images = self.mlp1(self.vision_model(pixel_values).last_hidden_state)
        tokens = self.language_model.get_input_embeddings()(input_ids)
        is_image = input_ids == self.image_token
        if is_image.sum() != images.shape[0] * images.shape[1]:
            raise ValueError(
                f"the prompts hold {is_image.sum()} image tokens, but {images.shape[0]} images make "
                f"{images.shape[0] * images.shape[1]}; give every image its tokens"
            )
        tokens = tokens.masked_scatter(is_image[..., None], images.to(tokens.dtype))
        # Padding does not count, so that a prompt has the same positions alone and in a batch.
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return self.language_model.model(
            inputs_embeds=tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state


def _language_config(size: LanguageSize, layers: int) -> Qwen3Config:
    stated = asdict(size) | {"num_hidden_layers": layers}
    rope = {"rope_type": "default", "rope_theta": stated.pop("rope_theta")}
    del stated["rope_scaling"]
    # A checkpoint holds `lm_head` and embedding under both names, and nothing says that they are equal.
    return Qwen3Config(**stated, rope_parameters=rope, tie_word_embeddings=False)
