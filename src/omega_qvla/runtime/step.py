"""Which denoising step a policy is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class StepError(RuntimeError):
    """A layer with scales per denoising step was run outside a step, or in one that was not calibrated."""


class CurrentStep(Protocol):
    """What a quantized layer needs to know."""

    @property
    def current(self) -> int: ...


class DenoisingStep:
    """The current step of one policy: set by its adapter, read by its quantized layers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._current: int | None = None

    @property
    def current(self) -> int:
        """Raises `StepError` outside a step."""
        if self._current is None:
            raise StepError("no denoising step is running; sample actions through the policy's own inference")
        return self._current

    @property
    def running(self) -> bool:
        return self._current is not None

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """While open, `step` is running. Raises `StepError` if it is not one of the calibrated steps."""
        if not 0 <= step < self.count:
            raise StepError(f"denoising step {step} was never seen; the policy has steps 0 to {self.count - 1}")
        self._current = step
        try:
            yield
        finally:
            self._current = None
