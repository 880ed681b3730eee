"""A tokenizer of a few words, in place of one from a hub."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = "the a on to of reach open close push pick place put door drawer puck goal block bowl cup left right red blue"


def tokenizer(
    special: Mapping[str, str] | None = None, numbers: Mapping[str, int] | None = None
) -> PreTrainedTokenizerFast:
    """Words of instructions, and every digit and punctuation mark for itself.

    `special`: more special tokens, by their role. `numbers`: of tokens that must have certain ones.
    """
    known = ["<pad>", "<unk>", "Task", "State", "Action", *",:;-", *"0123456789", *WORDS.split()]
    vocabulary = {word: number for number, word in enumerate(known)} | dict(numbers or {})
    taken = set(vocabulary.values())
    # Every number stands for something: the library lists those that do not, one by one, whenever it saves.
    vocabulary |= {f"<unused{number}>": number for number in range(max(taken)) if number not in taken}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)]
    model.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=dict(special or {})
    )
