"""The prompt of GR00T N1.5: Eagle's chat template around images and instruction.

Tokenizer and template lie in the directory `eagle` of the checkpoint, as Eagle's processor on the hub has them. Its
code is not run: the template writes a mark for each image, which becomes that image's tokens here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.groot_n15.architecture import EagleSize

EAGLE_DIRECTORY = "eagle"
_REPOSITORY = "lerobot/eagle2hg-processor-groot-n1p5"
_NEEDED = (
    "vocab.json, merges.txt, added_tokens.json, special_tokens_map.json, tokenizer_config.json and chat_template.json"
)
_VOCABULARIES = ("tokenizer.json",), ("vocab.json", "merges.txt")
_IMAGE, _START, _END = "<IMG_CONTEXT>", "<img>", "</img>"
_PLACEHOLDER = re.compile(r"<image-(\d+)>")


class Prompts:
    """Makes tokens of instructions."""

    def __init__(self, directory: Path, eagle: EagleSize, images: int) -> None:
        """For prompts with so many images each.

        Raises `CheckpointError` if tokenizer or template are missing or do not fit the model.
        """
        place = directory / EAGLE_DIRECTORY
        self._tokenizer, self._template = _tokenizer(place), _template(place)
        self._images, self._tokens = images, _IMAGE * eagle.vision_config.tokens
        number = self._tokenizer.convert_tokens_to_ids(_IMAGE)
        if number != eagle.image_token_index:
            raise CheckpointError(
                f"{place}: the tokenizer gives {_IMAGE} the number {number}, but the model has "
                f"{eagle.image_token_index}; {_advice(place)}"
            )
        try:
            self._text("")
        except (TemplateError, ValueError) as error:
            raise CheckpointError(f"{place}: the chat template is not Eagle's: {error}; {_advice(place)}") from error

    def __call__(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, L], shorter prompts padded, and what of them is no padding, bool [B, L].

        Raises `ValueError` if an instruction contains the mark of an image.
        """
        encoded = self._tokenizer([self._text(one) for one in instructions], padding=True, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def _text(self, instruction: str) -> str:
        # A list of one, in Python's notation: so it reaches the template in NVIDIA's policy, and hence in lerobot's.
        sentence = {"type": "text", "text": str([instruction])}
        conversation = [{"role": "user", "content": [*[{"type": "image"}] * self._images, sentence]}]
        text = self._tokenizer.apply_chat_template(
            conversation, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        found, expected = _PLACEHOLDER.findall(text), [str(1 + index) for index in range(self._images)]
        if found != expected:
            raise ValueError(f"the prompt has places for the images {found} instead of {expected}: {text!r}")
        return _PLACEHOLDER.sub(rf"<image \1>{_START}{self._tokens}{_END}", text)


def _tokenizer(place: Path) -> PreTrainedTokenizerBase:
    # Without its vocabulary, transformers would make an empty tokenizer.
    if not any(all((place / file).is_file() for file in files) for files in _VOCABULARIES):
        raise CheckpointError(f"{place} holds no tokenizer; {_advice(place)}")
    try:
        return AutoTokenizer.from_pretrained(
            str(place), config=Qwen3Config(), local_files_only=True, trust_remote_code=False, padding_side="left"
        )
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise CheckpointError(f"{place} holds no tokenizer that can be read: {error}; {_advice(place)}") from error


def _template(place: Path) -> str:
    """From the file of either name that Hugging Face has for it."""
    if (place / "chat_template.jinja").is_file():
        return (place / "chat_template.jinja").read_text()
    path = place / "chat_template.json"
    try:
        template = json.loads(path.read_text())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} holds no chat template: {error!r}; {_advice(place)}") from error
    return str(template)


def _advice(place: Path) -> str:
    return f"put {_NEEDED} of {_REPOSITORY} into {place}"
