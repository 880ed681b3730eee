"""Inferences side by side, so that each layer is met once by all of them.

Every inference is a coroutine inside the model's own code: at a meeting point it pauses until all others are there.
What a layer needs, its weights and its statistics, is then in memory once and for a short time, however many
observations there are and however the model is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from greenlet import getcurrent, greenlet

from omega_qvla.calibration.spill import Keeper
from omega_qvla.calibration.statistics import CalibrationError


def meet(point: str) -> None:
    """Called in an inference that `in_lockstep` runs: pause until all are at `point`."""
    outside = getcurrent().parent
    assert outside is not None, "only what in_lockstep runs can meet"
    outside.switch(point)


def in_lockstep(inferences: Sequence[Callable[[], object]], keeper: Keeper | None = None) -> Iterator[str]:
    """Run all inferences from one meeting point to the next; gives the points where all have met.

    They go on when the next point is asked for, and are abandoned when the iterator is closed. `keeper`: told of
    every inference that pauses and that is about to go on.

    Raises `CalibrationError` if they do not meet at the same points, and whatever an inference raises.
    """
    with closing(_Company(inferences, keeper)) as company:
        while (point := company.advance()) is not None:
            yield point


class _Company:
    def __init__(self, inferences: Sequence[Callable[[], object]], keeper: Keeper | None) -> None:
        self._members = [greenlet(inference) for inference in inferences]
        self._keeper = keeper

    def advance(self) -> str | None:
        """The next point where all meet; None if all have ended."""
        reached = [self._resume(member) for member in self._members]
        ended = [member.dead for member in self._members]
        if all(ended):
            return None
        points = {point for point, end in zip(reached, ended, strict=True) if not end}
        if len(points) > 1 or any(ended):
            raise CalibrationError(
                f"the calibration inferences do not run the same layers: some reached {min(points)}, others "
                f"{max(points) if len(points) > 1 else 'the end'}; calibrate on observations of one kind"
            )
        return points.pop()

    def _resume(self, member: greenlet) -> str:
        if self._keeper is not None:
            self._keeper.before_going_on(member)
        point = member.switch()
        if self._keeper is not None and not member.dead:
            self._keeper.after_pausing(member)
        return point

    def close(self) -> None:
        for member in self._members:
            if self._keeper is not None:
                self._keeper.before_going_on(member)  # what unwinds may look at its tensors
            if member:
                member.throw()
