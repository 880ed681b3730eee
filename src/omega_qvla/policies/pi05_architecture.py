"""pi0.5 at any size, built from lerobot's own classes.

lerobot knows pi0.5 in one size and hard-codes the sizes of its parts in constructors. A checkpoint of another
size says so in a file of its own, `architecture.json`, beside lerobot's `config.json`; the constructors then
receive these sizes. Nothing of the model's code is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    """Sizes of a pi0.5 that is not lerobot's standard one."""

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


def build(config: PI05Config, architecture: Architecture | None) -> PI05Policy:
    """A pi0.5 with freshly initialized weights, in the standard size if `architecture` is None."""
    if architecture is None:
        return PI05Policy(config)
    with _sizes(architecture):
        return PI05Policy(config)


@contextmanager
def _sizes(architecture: Architecture) -> Iterator[None]:
    """While open, lerobot's constructors build `architecture` instead of the standard size."""
    names = (
        "get_gemma_config",
        "PaliGemmaForConditionalGenerationWithPiGemma",
        "PiGemmaForCausalLM",
    )
    original = {name: getattr(modeling_pi05, name) for name in names}
    stacks = {"gemma_2b": architecture.language, "gemma_300m": architecture.expert}

    def gemma_config(variant: str) -> modeling_pi05.GemmaConfig:
        return modeling_pi05.GemmaConfig(**asdict(stacks[variant]))

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
        setattr(modeling_pi05, name, replacement)
    try:
        yield
    finally:
        for name, value in original.items():
            setattr(modeling_pi05, name, value)
