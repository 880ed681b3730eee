"""A checkpoint that lerobot 0.5.1 has fine-tuned: its robot and its sizes.

`config.json` names the base model on the hub instead of stating its sizes. Those of NVIDIA's release are known; of
another base model, `base/config.json` is read. The processors that lerobot saved beside it hold the statistics.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.groot_n15.architecture import BASE_FILE, CONFIG_FILE, ActionHeadSize, Architecture
from omega_qvla.policies.groot_n15.normalization import Normalization
from omega_qvla.policies.groot_n15.nvidia_layout import CHOICES_FILE
from omega_qvla.policies.groot_n15.robot import Robot
from omega_qvla.policies.groot_n15.strict_json import read_strictly, validated

TYPE = "groot"
PREPROCESSOR_FILE, POSTPROCESSOR_FILE = "policy_preprocessor.json", "policy_postprocessor.json"

_BASE = "GR00T-N1.5-3B"
_IMAGES = "observation.images."
_RENAME, _PACK, _UNPACK = (
    "rename_observations_processor",
    "groot_pack_inputs_v3",
    "groot_action_unpack_unnormalize_v1",
)
_UNDERSTOOD = {
    _RENAME, _PACK, _UNPACK, "to_batch_processor", "groot_eagle_encode_v3", "groot_eagle_collate_v3",
    "device_processor",
}  # fmt: skip
_PARTLY = ConfigDict(strict=True)
"""Most settings are of the training; these are all that inference reads."""


@dataclass(frozen=True, config=_PARTLY)
class _Feature:
    type: str
    shape: tuple[PositiveInt, ...]


@dataclass(frozen=True, config=_PARTLY)
class _Config:
    """The content of `config.json`."""

    type: Literal["groot"]
    base_model_path: str
    input_features: dict[str, _Feature]
    output_features: dict[str, _Feature]
    chunk_size: PositiveInt
    n_action_steps: PositiveInt


@dataclass(frozen=True, config=_PARTLY)
class _Step:
    """One step of a processor."""

    registry_name: str
    config: dict[str, Any] = field(default_factory=dict)
    state_file: str | None = None


@dataclass(frozen=True, config=_PARTLY)
class _Processor:
    steps: list[_Step]


@dataclass(frozen=True, config=_PARTLY)
class _Pack:
    """Settings of the step that normalizes the state."""

    embodiment_tag: str
    embodiment_mapping: dict[str, int]
    max_state_dim: PositiveInt
    max_action_dim: PositiveInt
    state_horizon: Literal[1] = 1
    language_key: Literal["task"] = "task"
    formalize_language: Literal[False] = False
    normalize_min_max: Literal[True] = True


@dataclass(frozen=True, config=_PARTLY)
class _Unpack:
    """Settings of the step that takes the normalization of actions back."""

    env_action_dim: int
    normalize_min_max: Literal[True] = True


def read_architecture(directory: Path) -> Architecture:
    """Raises `CheckpointError` if the sizes of the base model are not known."""
    if (directory / BASE_FILE).is_file():
        return Architecture.read(directory, BASE_FILE)
    named = read_strictly(directory, CONFIG_FILE, _Config, {}).base_model_path
    if Path(named).name != _BASE:
        raise CheckpointError(
            f"{directory / CONFIG_FILE} names the base model {named}, whose sizes are not known here; put its "
            f"config.json into {directory / BASE_FILE}"
        )
    return Architecture.read(directory, None)


def read_robot(directory: Path, size: ActionHeadSize) -> Robot:
    """Raises `CheckpointError` if a file is missing or malformed, or states what is not supported."""
    config = read_strictly(directory, CONFIG_FILE, _Config, {})
    if (directory / CHOICES_FILE).exists():
        raise CheckpointError(
            f"{directory / CHOICES_FILE} is not read for a checkpoint of lerobot, whose processors say everything; "
            "remove it"
        )
    # Sorted, as lerobot stacks them.
    cameras = tuple(sorted(key.removeprefix(_IMAGES) for key in config.input_features if key.startswith(_IMAGES)))
    if not cameras:
        raise CheckpointError(f"{directory / CONFIG_FILE}: input_features names no {_IMAGES}*; add the cameras")
    rename, pack = (_step(directory, PREPROCESSOR_FILE, name) for name in (_RENAME, _PACK))
    if renamed := sorted(rename.config.get("rename_map", {}).keys() & config.input_features.keys()):
        raise CheckpointError(
            f"{directory / PREPROCESSOR_FILE} renames {renamed[0]}, which config.json already names as the model "
            "knows it; leave it out of rename_map"
        )
    unpack = _step(directory, POSTPROCESSOR_FILE, _UNPACK)
    settings = validated(_Pack, pack.config, f"{directory / PREPROCESSOR_FILE}: {_PACK}")
    undo = validated(_Unpack, unpack.config, f"{directory / POSTPROCESSOR_FILE}: {_UNPACK}")
    for name, stated, expected in (
        ("max_state_dim", settings.max_state_dim, size.max_state_dim),
        ("max_action_dim", settings.max_action_dim, size.action_dim),
    ):
        if stated != expected:
            raise CheckpointError(
                f"{directory / PREPROCESSOR_FILE}: {name} is {stated}, but the model has {expected}; make them equal"
            )
    if settings.embodiment_tag not in settings.embodiment_mapping:
        raise CheckpointError(
            f"{directory / PREPROCESSOR_FILE}: embodiment_mapping has no number for {settings.embodiment_tag!r}; add "
            "it (lerobot took 0 then)"
        )
    robot = Robot(
        cameras,
        settings.embodiment_mapping[settings.embodiment_tag],
        None,
        {"state": _normalization(directory, PREPROCESSOR_FILE, pack, "observation.state", config.input_features)},
        {"action": _normalization(directory, POSTPROCESSOR_FILE, unpack, "action", config.output_features)},
        min(config.n_action_steps, config.chunk_size, size.action_horizon),
    )
    if undo.env_action_dim != robot.action_width:
        raise CheckpointError(
            f"{directory / POSTPROCESSOR_FILE}: env_action_dim is {undo.env_action_dim}, but config.json has actions "
            f"of width {robot.action_width}; make them equal"
        )
    robot.check(size, str(directory / CONFIG_FILE))
    return robot


def _step(directory: Path, file: str, name: str) -> _Step:
    """The only step of a processor that has this name."""
    steps = read_strictly(directory, file, _Processor, {}).steps
    if other := [step.registry_name for step in steps if step.registry_name not in _UNDERSTOOD]:
        raise CheckpointError(
            f"{directory / file}: the step {other[0]} is none of GR00T N1.5 in lerobot 0.5.1 and is not supported; "
            "remove it if the policy was trained without"
        )
    found = [step for step in steps if step.registry_name == name]
    if len(found) != 1:
        raise CheckpointError(
            f"{directory / file} has {len(found)} steps {name} instead of one; restore the file that lerobot wrote"
        )
    return found[0]


def _normalization(directory: Path, file: str, step: _Step, key: str, features: dict[str, _Feature]) -> Normalization:
    if key not in features or len(features[key].shape) != 1:
        raise CheckpointError(f"{directory / CONFIG_FILE} does not state the width of {key}; add it to its features")
    statistics = _statistics(directory, file, step)
    of_key = {name.removeprefix(f"{key}."): value for name, value in statistics.items() if name.startswith(f"{key}.")}
    where = f"{directory / str(step.state_file)}: {key}"
    return Normalization.measured("min_max", features[key].shape[0], of_key, where)


def _statistics(directory: Path, file: str, step: _Step) -> dict[str, Tensor]:
    name = step.state_file
    if name is None or Path(name).name != name or not (directory / name).is_file():
        raise CheckpointError(
            f"{directory / file}: the statistics of {step.registry_name} are to lie in {name!r}, which is not there; "
            "copy the file that lerobot saved with it"
        )
    try:
        return load_file(directory / name)
    except SafetensorError as error:
        raise CheckpointError(f"{directory / name} is no safetensors file: {error}") from error
