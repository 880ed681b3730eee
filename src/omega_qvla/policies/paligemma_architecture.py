"""pi0.5, and pi0 with its parts, at any size, built from lerobot's own classes.

lerobot knows them in one size and hard-codes the sizes of their parts in constructors. A checkpoint of another
size says so in a file of its own, `architecture.json`, beside lerobot's `config.json`; the constructors then
receive these sizes. Nothing of the model's code is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lerobot.policies.pi0 import PI0Config, PI0Policy, modeling_pi0
from lerobot.policies.pi05 import PI05Config, PI05Policy, modeling_pi05

ARCHITECTURE_FILE = "architecture.json"


@dataclass(frozen=True)
class GemmaSize:
    """One Gemma stack. lerobot's training forward requires eight heads."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class VisionSize:
    """The SigLIP tower."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int


@dataclass(frozen=True)
class Architecture:
    """Sizes of a pi0.5, or a pi0, that is not lerobot's standard one."""

    vision: VisionSize
    language: GemmaSize
    expert: GemmaSize
    vocabulary: int

    @classmethod
    def read(cls, directory: Path) -> Architecture | None:
        """The sizes stated in a checkpoint directory; None if it is of the standard size.

        Raises `ValueError` if the file is not of this form.
        """
        path = directory / ARCHITECTURE_FILE
        if not path.exists():
            return None
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} does not describe a pi0.5 architecture: {error}") from error

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Architecture:
        return cls(
            VisionSize(**data["vision"]),
            GemmaSize(**data["language"]),
            GemmaSize(**data["expert"]),
            data["vocabulary"],
        )

    def write(self, directory: Path) -> None:
        (directory / ARCHITECTURE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


def build(config: PI05Config | PI0Config, architecture: Architecture | None) -> PI05Policy | PI0Policy:
    """The policy of `config` with freshly initialized weights, in the standard size if `architecture` is None."""
    policy, modeling = (PI05Policy, modeling_pi05) if isinstance(config, PI05Config) else (PI0Policy, modeling_pi0)
    if architecture is None:
        return policy(config)
    with _sizes(architecture, modeling):
        return policy(config)


@contextmanager
def _sizes(architecture: Architecture, modeling: ModuleType) -> Iterator[None]:
    """While open, the constructors in `modeling` build `architecture` instead of the standard size."""
    names = (
        "get_gemma_config",
        "PaliGemmaForConditionalGenerationWithPiGemma",
        "PiGemmaForCausalLM",
    )
    original = {name: getattr(modeling, name) for name in names}
    stacks = {"gemma_2b": architecture.language, "gemma_300m": architecture.expert}

    def gemma_config(variant: str) -> Any:
        return modeling.GemmaConfig(**asdict(stacks[variant]))

    def paligemma(config: Any) -> Any:
        vision, size = config.vision_config, architecture.vision
        vision.hidden_size, vision.num_hidden_layers = size.width, size.depth
        vision.num_attention_heads, vision.intermediate_size = size.num_heads, size.mlp_dim
        vision.patch_size = size.patch_size
        vision.projection_dim = config.text_config.hidden_size
        config.text_config.vocab_size = architecture.vocabulary
        return original["PaliGemmaForConditionalGenerationWithPiGemma"](config=config)

    def expert(config: Any) -> Any:
        config.vocab_size = architecture.vocabulary
        return original["PiGemmaForCausalLM"](config=config)

    for name, replacement in zip(names, (gemma_config, paligemma, expert), strict=True):
        setattr(modeling, name, replacement)
    try:
        yield
    finally:
        for name, value in original.items():
            setattr(modeling, name, value)
