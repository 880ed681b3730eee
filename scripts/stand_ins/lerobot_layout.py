"""Stand-ins in lerobot's layout: pi0.5, pi0 and SmolVLA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0 import PI0Config
from lerobot.policies.pi05 import PI05Config
from lerobot.policies.smolvla import SmolVLAConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from transformers import (
    AutoTokenizer,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from omega_qvla.policies.paligemma_architecture import Architecture, GemmaSize, VisionSize
from omega_qvla.policies.smolvla import VLM_DIRECTORY
from stand_ins.words import tokenizer


@dataclass(frozen=True)
class LerobotStandIn:
    """A policy of lerobot."""

    config: PreTrainedConfig
    architecture: Architecture | None = None
    """Of a pi0 or pi0.5 that is not of the released size."""
    vlm: dict[str, Any] | None = None
    """Of a SmolVLA: the configuration of its VLM, without what follows from the tokenizer."""
    shard_bytes: int | None = None

    @property
    def family(self) -> str:
        return self.config.type

    def write_support(self, directory: Path) -> None:
        """Configuration, lerobot's own processors for it, and tokenizers."""
        words = tokenizer()
        words.save_pretrained(directory / "tokenizer")
        self.config.save_pretrained(directory)
        if self.architecture is not None:
            self.architecture.write(directory)
        if self.vlm is not None:
            _write_vlm(self.vlm, directory / VLM_DIRECTORY)
        as_they_are = {}
        for key, feature in ((OBS_STATE, self.config.robot_state_feature), (ACTION, self.config.action_feature)):
            zeros, ones = torch.zeros(feature.shape), torch.ones(feature.shape)
            as_they_are[key] = {"mean": zeros, "std": ones, "q01": -ones, "q99": ones}
        with patch.object(AutoTokenizer, "from_pretrained", return_value=words):
            pipelines = make_pre_post_processors(self.config, dataset_stats=as_they_are)
        for pipeline in pipelines:
            pipeline.save_pretrained(directory)


def settings(image: int, state: int, action: int) -> dict[str, Any]:
    """What every configuration says: three cameras of `image` pixels, and the dimensions of states and actions."""
    camera = PolicyFeature(FeatureType.VISUAL, (3, image, image))
    inputs = {f"{OBS_IMAGES}.{name}": camera for name in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")}
    inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (state,))
    outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (action,))}
    return {"device": "cpu", "input_features": inputs, "output_features": outputs}


def _pi05() -> LerobotStandIn:
    return LerobotStandIn(PI05Config(**settings(image=224, state=32, action=32), dtype="bfloat16"))


def _pi0() -> LerobotStandIn:
    return LerobotStandIn(PI0Config(**settings(image=224, state=32, action=32), dtype="bfloat16"))


def _smolvla() -> LerobotStandIn:
    """On SmolVLM2-500M."""
    text = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "head_dim": 64}
    text |= {"num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49280}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    vision |= {"num_attention_heads": 12, "image_size": 512, "patch_size": 16}
    config = SmolVLAConfig(**settings(image=256, state=6, action=6), load_vlm_weights=True)
    return LerobotStandIn(config, vlm={"text_config": text, "vision_config": vision, "scale_factor": 4})


def pi05_expert() -> LerobotStandIn:
    """A pi0.5 of which the action expert alone has the released size."""
    architecture = Architecture(
        vision=VisionSize(width=192, depth=2, mlp_dim=384, num_heads=3, patch_size=14),
        language=GemmaSize(width=512, depth=18, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=256),
        expert=GemmaSize(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
        vocabulary=4096,
    )
    return LerobotStandIn(PI05Config(**settings(image=224, state=32, action=32), dtype="float32"), architecture)


LEROBOT = {"pi05": _pi05, "pi0": _pi0, "smolvla": _smolvla}
"""The released sizes."""


def _write_vlm(stated: dict[str, Any], out: Path) -> None:
    """What lies in a SmolVLM's hub repository besides weights."""
    special = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    words = tokenizer(special)
    text = {"model_type": "llama", **stated["text_config"]}
    tokens = {"image_token_id": words.image_token_id, "pad_token_id": words.pad_token_id}
    SmolVLMConfig(**stated | {"text_config": text} | tokens).save_pretrained(out)
    processor = SmolVLMProcessor(SmolVLMImageProcessor(), words, SmolVLMVideoProcessor(), chat_template="none")
    processor.save_pretrained(out)
