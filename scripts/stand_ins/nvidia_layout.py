"""Stand-ins in NVIDIA's layout: GR00T N1.5."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from omega_qvla.policies.groot_n15 import RELEASED, Architecture
from omega_qvla.policies.groot_n15.architecture import CONFIG_FILE, EAGLE_FILE, BackboneSize, VisionSize
from omega_qvla.policies.groot_n15.nvidia_layout import CHOICES_FILE, METADATA_FILE
from omega_qvla.policies.groot_n15.prompt import EAGLE_DIRECTORY
from stand_ins.words import tokenizer

CAMERAS = ["front", "wrist"]
WIDTHS = {"arm": 6, "gripper": 1}
"""Of the parts of states and actions."""

_IMAGE = "<IMG_CONTEXT>"
_TEMPLATE = (
    "{% set images = namespace(count=0) %}{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set images.count = images.count + 1 %}<image-{{ images.count }}>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
"""Writes images and instruction as Eagle's template does, without its words around them."""


@dataclass(frozen=True)
class GrootN15StandIn:
    """A GR00T N1.5 of a robot with one arm and two cameras."""

    architecture: Architecture = RELEASED
    shard_bytes: int | None = 5 * 10**9
    family: ClassVar[str] = "groot_n15"

    def write_support(self, directory: Path) -> None:
        """Configuration, statistics of the robot, and what Eagle's processor consists of."""
        eagle, head = self.architecture.eagle, self.architecture.action_head
        sizes = {"action_dim": head.action_dim, "action_horizon": head.action_horizon}
        sections = {"backbone_cfg": asdict(self.architecture.backbone), "action_head_cfg": asdict(head)}
        _write(directory / CONFIG_FILE, {"model_type": "gr00t_n1_5"} | sizes | sections)
        tokenizer({"image_context_token": _IMAGE}, {_IMAGE: eagle.image_token_index}).save_pretrained(
            directory / EAGLE_DIRECTORY
        )
        _write(directory / EAGLE_DIRECTORY / "chat_template.json", {"chat_template": _TEMPLATE})
        if eagle != RELEASED.eagle:
            _write(directory / EAGLE_FILE, asdict(eagle))
        _write(directory / METADATA_FILE, {"new_embodiment": _robot()})
        parts = list(WIDTHS)
        _write(directory / CHOICES_FILE, {"cameras": CAMERAS, "state": parts, "action": parts})


def groot_n15_head() -> GrootN15StandIn:
    """A GR00T N1.5 of which the action head alone has the released size."""
    vision = VisionSize(192, 384, 2, 3, image_size=224, patch_size=14)
    language = replace(RELEASED.eagle.text_config, vocab_size=4096, intermediate_size=1024, num_hidden_layers=1)
    eagle = replace(RELEASED.eagle, vision_config=vision, text_config=language, image_token_index=4090)
    return GrootN15StandIn(replace(RELEASED, eagle=eagle, backbone=BackboneSize(select_layer=1)))


def _robot() -> dict[str, Any]:
    """Its states and actions are normalized to what they are."""
    shapes = {part: {"shape": [width]} for part, width in WIDTHS.items()}
    ranges = {part: {"min": [-1.0] * width, "max": [1.0] * width} for part, width in WIDTHS.items()}
    cameras = {camera: {"resolution": [256, 256]} for camera in CAMERAS}
    return {
        "modalities": {"video": cameras, "state": shapes, "action": shapes},
        "statistics": {"state": ranges, "action": ranges},
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
