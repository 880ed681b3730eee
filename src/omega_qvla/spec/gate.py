"""How far a quantized policy's actions may be from full precision's before a robot moves, as data.

The yardstick is full precision itself: what it does anyway, mostly by how much its actions differ under another draw
of the noise, which it takes for equally good. Defaults are multiples of that with a meaning (docs/gate.md).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from omega_qvla.spec.linear import STRICT

Multiple = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class GateSpec:
    """Limits as multiples of full precision's own, per dimension of the action; the `[gate]` table of a recipe."""

    error_p50: Multiple = 0.33
    """Median of |a - r| over the median of |r' - r|: r full precision, a quantized under the same noise, r' full
    precision under other noise. A third, added in quadrature, makes the spread 5 % wider."""
    error_p95: Multiple = 0.33
    error_p99: Multiple = 0.5
    """Half, which makes the spread 12 % wider: in the tail are situations between two courses of action, where any
    perturbation may decide anew."""
    error_max: Multiple = 1.0
    """No single action is farther off than another draw of the noise could have put it."""
    jerk: Multiple = 1.41
    """Root mean square of third differences along a chunk, over full precision's: twice its energy."""
    splice_jump: Multiple = 1.41
    """Root mean square of the step from the last executed action of a chunk to the first of the next, likewise."""
    gripper_flips: Multiple = 1.0
    """Share of gripper commands to the other side, over the share that other noise turns over."""
    saturation: Multiple = 1.0
    """Share of actions at the limits of their normalization where full precision's are not, over the share that other
    noise puts there."""
    resolution: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """What is too small to matter: this share of a dimension's range for errors, jerk and jumps, this share of all
    actions for flips and saturation. No limit is below it, and a command this close to where the gripper switches is
    neither open nor closed."""
