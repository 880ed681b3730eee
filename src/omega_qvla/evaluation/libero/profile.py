"""How a harness runs LIBERO: what is the same benchmark under one name differs between them, and the score with it.

A profile is a TOML file: those beside this module are named after the harness whose code they repeat, and
`--profile FILE.toml` reads another.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from omega_qvla.evaluation.seeds import Partition
from omega_qvla.spec.named import names_in, read_named

Suite = Literal["spatial", "object", "goal", "long"]
SUITES: dict[Suite, str] = {
    "spatial": "libero_spatial",
    "object": "libero_object",
    "goal": "libero_goal",
    "long": "libero_10",
}
"""The papers' names of the four suites, and LIBERO's."""
INITIAL_STATES = 50
"""Of every task, numbered from 0; they come with LIBERO."""
HORIZON = 1000
"""Steps after which LIBERO's simulator refuses another one, those included in which the robot waits."""

_STRICT = ConfigDict(extra="forbid", strict=True)
_DIRECTORY = resources.files(__package__ or "") / "profiles"
_States = Annotated[list[Annotated[int, Field(ge=0, lt=INITIAL_STATES)]], Field(min_length=2, max_length=2)]


class ProfileError(ValueError):
    """A profile that cannot be read; the message says what to change."""


@dataclass(frozen=True, config=_STRICT)
class InitialStates:
    """First and last number of the initial states of every task that are for each use; no state is for two."""

    evaluation: _States
    held_out: _States
    calibration: _States

    def __post_init__(self) -> None:
        self.partition()

    def partition(self) -> Partition:
        """Raises `ValueError` for a state that is for two uses."""
        return Partition(**{use: range(first, last + 1) for use, (first, last) in vars(self).items()})


@dataclass(frozen=True, config=_STRICT)
class StepLimits:
    """Actions of a policy, per suite, after which an episode has failed; waiting does not count."""

    spatial: PositiveInt
    object: PositiveInt
    goal: PositiveInt
    long: PositiveInt


@dataclass(frozen=True, config=_STRICT)
class Profile:
    """One harness's way of running LIBERO."""

    name: str
    summary: str
    max_steps: StepLimits
    wait_steps: NonNegativeInt
    """Actions that do nothing, with an open gripper, before the policy's first: objects fall and settle."""
    camera_size: PositiveInt
    """Side of the square images that both cameras render, in pixels."""
    image_rotation: Literal[0, 180]
    """Degrees by which images are turned; LIBERO renders upside down."""
    state: Literal["eef_position, axis_angle, gripper_fingers"]
    """What the robot feels, float32 [8]: end effector's position in metres, its orientation as axis times angle in
    radians (angle 0 to 2 π), and the positions of both fingers in metres."""
    gripper: Literal["closed_is_plus_one", "open_is_one"]
    """The last dimension of a policy's action: LIBERO's own from -1, open, to 1, closed, taken as it is; or from 0,
    closed, to 1, open, which is turned and rounded to LIBERO's -1 or 1."""
    initial_states: InitialStates
    simulator_seed: NonNegativeInt
    """Seed of the simulator's own random numbers in every episode."""
    seed_counts_states: bool = False
    """Whether the initial state's number is added to that seed."""
    replan_interval: PositiveInt | None = None
    """Actions of a chunk that are executed; None: as many as the policy's configuration says."""
    image_size: PositiveInt | None = None
    """Side to which images are resized (bilinear, 8 bits) before the policy gets them; None: as rendered."""

    def step_limit(self, suite: Suite) -> int:
        """What the profile says, but no more than what LIBERO's simulator leaves after waiting."""
        return min(vars(self.max_steps)[suite], HORIZON - self.wait_steps)

    def seed(self, state: int) -> int:
        """The simulator's seed for the episode of an initial state."""
        return self.simulator_seed + (state if self.seed_counts_states else 0)


_PROFILE: TypeAdapter[Profile] = TypeAdapter(Profile)


def profile_names() -> list[str]:
    """The profiles that come with the package."""
    return names_in(_DIRECTORY)


def read_profile(name_or_path: str | Path) -> Profile:
    """A profile by its name, or from a TOML file.

    Raises `ProfileError` if there is none, or if a key or value in it is not of a profile.
    """
    return read_named("profile", name_or_path, _DIRECTORY, _profile_from_dict, ProfileError)


def _profile_from_dict(data: dict[str, Any]) -> Profile:
    try:
        # As JSON, because strict validation takes tables for dataclasses from nowhere else.
        return _PROFILE.validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(key) for key in first["loc"])
        raise ProfileError(f"{place}: {first['msg']} (found {first['input']!r})") from error
