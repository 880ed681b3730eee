"""The layouts in which floating-point checkpoints come, and what a policy is opened from.

| layout | `config.json` says | tensors | besides |
|---|---|---|---|
| lerobot | `"type"`: the family | `model.…`, one file or shards | processors, tokenizer |
| openpi, converted to PyTorch | sizes of its model | those without `model.` | `assets/<asset id>/norm_stats.json` |
| GR00T N1.5 of NVIDIA | `"model_type": "gr00t_n1_5"` | its own names | `experiment_cfg/metadata.json`, `eagle` |
| GR00T N1.5 of lerobot 0.5.1 | `"type": "groot"` | `_groot_model.…` | processors, `eagle` |
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.stored import StoredTensors, read_json_object

_GROOT_PREFIX = "_groot_model."


@dataclass(frozen=True)
class Layout:
    """A checkpoint directory as its adapter wants it."""

    family: str
    support: Path
    """Where configuration, processors and tokenizer lie as lerobot has them."""
    weights: Path
    """Where the weights lie."""
    module_name: Callable[[str], str] | None = None
    """What the module calls the tensor with a key; None: the same."""
    scratch: tempfile.TemporaryDirectory[str] | None = None
    """Holds `support` if that had to be translated; it goes when this object goes."""

    def tensors(self) -> StoredTensors:
        """By the names of the module. Raises `CheckpointError` if they cannot be read as they are."""
        stored = StoredTensors.open(self.weights)
        return stored if self.module_name is None else stored.renamed(self.module_name)


def recognized(directory: Path) -> Layout:
    """Raises `CheckpointError` if the directory is of no known layout, or lacks what its layout has."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no lerobot checkpoint: config.json is missing")
    config = read_json_object(path)
    if is_openpi(config):
        return _translated(directory)
    if config.get("model_type") == "gr00t_n1_5":
        return Layout("groot_n15", directory, directory)
    family = config.get("type")
    if not isinstance(family, str):
        raise CheckpointError(
            f"{path} states no type of policy; the configurations of lerobot, of openpi and of GR00T N1.5 are known"
        )
    if family == "groot" and _is_n15(directory):
        return Layout("groot_n15", directory, directory, lambda key: key.removeprefix(_GROOT_PREFIX))
    return Layout(family, directory, directory)


def is_openpi(config: dict[str, object]) -> bool:
    """Whether the content of a `config.json` is openpi's."""
    return "type" not in config and {"action_horizon", "paligemma_variant"} <= config.keys()


def _is_n15(directory: Path) -> bool:
    """Whether a GR00T of lerobot is N1.5, told by the names of its tensors: 0.5.1 and later releases have the same
    `type`, and N1.7 has another vision-language model."""
    return any(
        name.startswith(f"{_GROOT_PREFIX}backbone.eagle_model.") for name in StoredTensors.open(directory).names()
    )


def _translated(directory: Path) -> Layout:
    from omega_qvla.policies.openpi import module_name, translate  # which imports lerobot

    scratch = tempfile.TemporaryDirectory()
    support = Path(scratch.name) / directory.resolve().name
    translate(directory, support)
    family = read_json_object(support / "config.json")["type"]
    return Layout(family, support, directory, module_name, scratch)
