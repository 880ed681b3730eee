"""From actions to verdicts: what is measured, full precision's own, the limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from omega_qvla.evaluation import motion
from omega_qvla.spec import GateSpec

Bounds = tuple[np.ndarray, np.ndarray]
"""Lowest and highest action of the normalization, each float64 [D]."""
_RANGE_PERCENTILES = (1, 99)
"""Of full precision's actions: the range of a dimension whose normalization has no limits."""


@dataclass(frozen=True)
class Gripper:
    """Which number of an action is the gripper's, and where its command turns."""

    dimension: int | None = -1
    """None: the robot has none."""
    threshold: float = 0.0

    def index(self, width: int) -> int | None:
        """Its place in an action of `width` numbers, from the left. Raises `ValueError` if there is none."""
        if self.dimension is None:
            return None
        if not -width <= self.dimension < width:
            raise ValueError(f"the gripper cannot be dimension {self.dimension}: an action has {width}")
        return self.dimension % width


@dataclass(frozen=True)
class GateCheck:
    """One figure with its limit; it passes if it is not above it."""

    measure: str
    dimension: int | None
    """Of the action; None if it is about all of it."""
    unit: str
    """`action`: in the action's physical unit; `share`: of all actions."""
    value: float
    own: float
    """Of full precision: see `GateSpec`."""
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Answers:
    """Actions float64 [N, chunk, D] on the same N observations."""

    reference: np.ndarray
    """Full precision."""
    policy: np.ndarray
    """Quantized, under the same noise."""
    redrawn: np.ndarray
    """Full precision under other noise."""


@dataclass(frozen=True)
class GateReport:
    """What a gate found."""

    policy: str
    execution: str
    observations: int
    source: str
    """Where they come from."""
    held_out: bool
    """Whether calibration saw nothing of the episodes that they are from."""
    limits: GateSpec
    checks: tuple[GateCheck, ...]
    not_measured: tuple[str, ...]
    """What could not be measured, and why."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verdicts(
    answers: Answers,
    limits: GateSpec,
    gripper: Gripper,
    *,
    bounds: Bounds | None,
    consecutive: Sequence[tuple[int, int]],
    executed: int,
) -> tuple[tuple[GateCheck, ...], tuple[str, ...]]:
    """All checks, and what could not be measured.

    The gripper is a switch: it is judged by the side that it is on, not by how far its command is off. `bounds`: None
    if the normalization has none. `consecutive`: positions of observations that follow one another, `executed`
    actions apart. Raises `ValueError` for a gripper that is no dimension of the action.
    """
    width = answers.reference.shape[-1]
    switch = gripper.index(width)
    smallest = limits.resolution * _ranges(answers.reference, bounds)
    moving = [d for d in range(width) if smallest[d] > 0]
    graded = [d for d in moving if d != switch]
    missing = [f"dimension {d}: full precision never moves it" for d in range(width) if d not in moving]
    checks = [*_errors(answers, limits, graded, smallest)]
    if answers.reference.shape[1] >= motion.SHORTEST_CHUNK:
        figures = motion.jerk(answers.policy), motion.jerk(answers.reference)
        checks += _ratios("jerk", *figures, limits.jerk, graded, smallest)
    else:
        missing.append(f"jerk: a chunk has fewer than {motion.SHORTEST_CHUNK} actions")
    if consecutive:
        policy, own = (
            motion.splice_jump(actions, consecutive, executed) for actions in (answers.policy, answers.reference)
        )
        checks += _ratios("splice jump", policy, own, limits.splice_jump, graded, smallest)
    else:
        missing.append("splice jump: no two observations follow one another")
    if switch is not None and switch in moving:
        checks.append(_flips(answers, limits, switch, gripper.threshold, float(smallest[switch])))
    if bounds is not None:
        checks += _saturation(answers, limits, bounds, moving, smallest)
    else:
        missing.append("saturation: the actions' normalization has no limits")
    return tuple(checks), tuple(missing)


def _ranges(reference: np.ndarray, bounds: Bounds | None) -> np.ndarray:
    """How far each dimension goes, [D]; 0 for one that does not move."""
    low, high = np.percentile(reference, _RANGE_PERCENTILES, axis=(0, 1)) if bounds is None else bounds
    return np.where(np.ptp(reference, axis=(0, 1)) > 0, high - low, 0.0)


def _errors(
    answers: Answers, limits: GateSpec, dimensions: Sequence[int], smallest: np.ndarray
) -> Iterator[GateCheck]:
    errors = motion.error_percentiles(answers.policy, answers.reference)
    spreads = motion.error_percentiles(answers.redrawn, answers.reference)
    multiples = {
        "p50": limits.error_p50,
        "p95": limits.error_p95,
        "p99": limits.error_p99,
        "max": limits.error_max,
    }
    for name, multiple in multiples.items():
        yield from _ratios(f"error {name}", errors[name], spreads[name], multiple, dimensions, smallest)


def _ratios(
    measure: str,
    values: np.ndarray,
    own: np.ndarray,
    multiple: float,
    dimensions: Sequence[int],
    smallest: np.ndarray,
) -> Iterator[GateCheck]:
    for d in dimensions:
        limit = max(multiple * float(own[d]), float(smallest[d]))
        yield GateCheck(measure, d, "action", float(values[d]), float(own[d]), limit)


def _flips(answers: Answers, limits: GateSpec, dimension: int, threshold: float, hesitation: float) -> GateCheck:
    def share(actions: np.ndarray) -> float:
        return motion.flips(actions[..., dimension], answers.reference[..., dimension], threshold, hesitation)

    own = share(answers.redrawn)
    limit = max(limits.gripper_flips * own, limits.resolution)
    return GateCheck("gripper flips", dimension, "share", share(answers.policy), own, limit)


def _saturation(
    answers: Answers, limits: GateSpec, bounds: Bounds, dimensions: Sequence[int], margin: np.ndarray
) -> Iterator[GateCheck]:
    before = motion.saturated(answers.reference, *bounds, margin)

    def newly(actions: np.ndarray) -> np.ndarray:
        return np.mean(motion.saturated(actions, *bounds, margin) & ~before, axis=(0, 1))

    values, own = newly(answers.policy), newly(answers.redrawn)
    for d in dimensions:
        limit = max(limits.saturation * float(own[d]), limits.resolution)
        yield GateCheck("newly at limits", d, "share", float(values[d]), float(own[d]), limit)
