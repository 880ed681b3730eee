"""The robot of a checkpoint in NVIDIA's layout.

`experiment_cfg/metadata.json` holds, for every embodiment of the training data, its cameras and the statistics of its
states and actions. Which of them a policy reads, in which order and how normalized is written in the code that
trained it, and not in the checkpoint. Where there is a choice, `groot_n15.json` beside `config.json` says it:

    {
      "embodiment": "new_embodiment",
      "cameras": ["front", "wrist"],
      "state": ["single_arm", "gripper"],
      "action": ["single_arm", "gripper"]
    }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.groot_n15.architecture import ActionHeadSize
from omega_qvla.policies.groot_n15.normalization import Mode, Normalization
from omega_qvla.policies.groot_n15.robot import Robot
from omega_qvla.policies.groot_n15.strict_json import read_strictly

METADATA_FILE = "experiment_cfg/metadata.json"
CHOICES_FILE = "groot_n15.json"
NUMBERS = {"oxe_droid": 17, "gr1": 24, "agibot_genie1": 26, "new_embodiment": 31}
"""Of NVIDIA's embodiments (`EMBODIMENT_TAG_MAPPING`)."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Choices:
    """The content of `groot_n15.json`: what the training code knew and the checkpoint does not say."""

    embodiment: str | None = None
    """Its tag in `metadata.json`."""
    embodiment_id: NonNegativeInt | None = None
    """Its number in the model. Known for NVIDIA's own tags."""
    cameras: tuple[str, ...] | None = None
    """In the order in which the model sees them."""
    state: tuple[str, ...] | None = None
    """The parts of the state in their order; the state of an observation is these, one after the other."""
    action: tuple[str, ...] | None = None
    """The same of actions."""
    state_normalization: dict[str, Mode] = field(default_factory=dict)
    """Of parts of the state that are not normalized by `min_max`."""
    action_normalization: dict[str, Mode] = field(default_factory=dict)
    crop: Annotated[float, Field(gt=0, le=1)] = 0.95
    """The share of height and width that is left of an image, as in all of NVIDIA's configurations; 1: all of it."""
    execute_steps: PositiveInt | None = None
    """How many actions of a chunk are executed; all of them by default."""


@dataclass(frozen=True, config=ConfigDict(strict=True))
class _Part:
    shape: tuple[PositiveInt]
    rotation_type: str | None = None


@dataclass(frozen=True, config=ConfigDict(strict=True))
class _Modalities:
    video: dict[str, object]
    state: dict[str, _Part]
    action: dict[str, _Part]


@dataclass(frozen=True, config=ConfigDict(strict=True))
class _Statistics:
    state: dict[str, dict[str, list[float]]]
    action: dict[str, dict[str, list[float]]]


@dataclass(frozen=True, config=ConfigDict(strict=True))
class _Embodiment:
    """What `metadata.json` says under one tag."""

    modalities: _Modalities
    statistics: _Statistics


def read_robot(directory: Path, size: ActionHeadSize) -> Robot:
    """Raises `CheckpointError` if a file is malformed, if the model is too small for the robot, or if there are
    several possibilities and none is chosen."""
    choices = Choices()
    if (directory / CHOICES_FILE).is_file():
        choices = read_strictly(directory, CHOICES_FILE, Choices, {})
    known = read_strictly(directory, METADATA_FILE, dict[str, _Embodiment], {})
    stated = None if choices.embodiment is None else (choices.embodiment,)
    (tag,) = _chosen(directory, "embodiment", stated, known)
    modalities, statistics = known[tag].modalities, known[tag].statistics
    robot = Robot(
        _chosen(directory, "cameras", choices.cameras, modalities.video),
        _number(directory, tag, choices.embodiment_id),
        choices.crop,
        _parts(directory, "state", choices.state, modalities.state, statistics.state, choices.state_normalization),
        _parts(
            directory, "action", choices.action, modalities.action, statistics.action, choices.action_normalization
        ),
        choices.execute_steps or size.action_horizon,
    )
    robot.check(size, f"{directory / METADATA_FILE} and {CHOICES_FILE}")
    return robot


def _chosen(
    directory: Path, what: str, stated: tuple[str, ...] | None, known: Mapping[str, object]
) -> tuple[str, ...]:
    """The names stated, or the only one there is."""
    if stated is None:
        if len(known) == 1:
            return tuple(known)
        raise CheckpointError(
            f"{directory / METADATA_FILE} leaves {what} open: {', '.join(known) or 'it names none'}; state in "
            f"{directory / CHOICES_FILE}, under {what!r}, what the policy was trained with, in its order"
        )
    if not stated or len(set(stated)) < len(stated) or not set(stated) <= known.keys():
        raise CheckpointError(
            f"{directory / CHOICES_FILE}: {what} is {', '.join(stated) or 'empty'}; name some of "
            f"{', '.join(known)}, each once"
        )
    return stated


def _number(directory: Path, tag: str, stated: int | None) -> int:
    if stated is not None:
        return stated
    if tag not in NUMBERS:
        raise CheckpointError(
            f"{directory / METADATA_FILE} does not say which number the embodiment {tag!r} has in the model; state "
            f"it in {directory / CHOICES_FILE}, under 'embodiment_id'"
        )
    return NUMBERS[tag]


def _parts(
    directory: Path,
    what: str,
    stated: tuple[str, ...] | None,
    known: Mapping[str, _Part],
    statistics: Mapping[str, Mapping[str, list[float]]],
    modes: Mapping[str, Mode],
) -> dict[str, Normalization]:
    names = _chosen(directory, what, stated, known)
    choices, section = directory / CHOICES_FILE, f"{what}_normalization"
    if unknown := sorted(modes.keys() - set(names)):
        raise CheckpointError(f"{choices}: {section} names {unknown[0]!r}, which is not in {what}; correct it")
    found = {}
    for name in names:
        if known[name].rotation_type is not None and name not in modes:
            raise CheckpointError(
                f"{directory / METADATA_FILE}: the {what} {name!r} is a rotation, which most pipelines represent "
                f"otherwise before they normalize it, and that is not supported; if this policy was trained on it as "
                f"it is, state in {choices}, under {section!r}, how it is normalized"
            )
        mode = modes.get(name, "min_max")
        if what == "action" and mode == "sin_cos":
            raise CheckpointError(f"{choices}: {section} has sin_cos for {name!r}; only states are normalized so")
        where = f"{directory / METADATA_FILE}: statistics.{what}.{name}"
        found[name] = Normalization.measured(mode, known[name].shape[0], statistics.get(name, {}), where)
    return found
