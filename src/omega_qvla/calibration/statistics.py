"""What the linears of a policy read, in the few numbers that calibration needs of it.

Statistics stream: Hessians and peaks are accumulated token by token, and of the tokens themselves at most a
fixed number is kept per site and denoising step. Language and vision have no steps.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_SAMPLES = 4096
"""Tokens kept per site and step for percentiles; beyond that, a uniform sample."""
_PANEL = 1024
"""Columns of a Hessian that are accumulated at a time: what lies above its diagonal is not computed."""


class CalibrationError(ValueError):
    """Statistics that cannot be had: the message names the site or step and what is wrong."""


@dataclass(frozen=True)
class Needs:
    """Which statistics of a site are wanted; peak and magnitude per channel always are."""

    hessian: bool = False
    samples: bool = False


@dataclass
class SiteStatistics:
    """Of the input X [tokens, in] of one site."""

    name: str
    needs: Needs
    tokens: int = 0
    peak: Tensor | None = None
    """Largest |X_j|, float32 [in]."""
    magnitude: Tensor | None = None
    """Sum of |X_j| over the tokens, float64 [in]."""
    samples: dict[int | None, Tensor] = field(default_factory=dict)
    """Tokens by denoising step, float32 [at most MAX_SAMPLES, in]; step None for parts that have none."""
    seen: dict[int | None, int] = field(default_factory=dict)
    """Tokens seen by denoising step."""

    def __post_init__(self) -> None:
        # Its own, so that what is sampled here does not depend on which other sites are visited.
        self._generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        self._lower: Tensor | None = None
        self._whole = False

    @property
    def hessian(self) -> Tensor | None:
        """XᵀX, float32 [in, in]; None if it was not needed."""
        if self._lower is not None and not self._whole:
            for start in range(0, len(self._lower), _PANEL):
                end = start + _PANEL
                self._lower[start:end, end:] = self._lower[end:, start:end].t()
            self._whole = True
        return self._lower

    def forget_hessian(self) -> None:
        """Free its memory."""
        self._lower = None

    def add(self, x: Tensor, step: int | None) -> None:
        """Add tokens x [tokens, in]. Raises `CalibrationError` if they are not finite."""
        size = x.abs()
        peak, magnitude = size.amax(0), size.sum(0, dtype=torch.float64)
        if not peak.isfinite().all():
            raise CalibrationError(f"the input of {self.name} contains NaN or infinity during calibration")
        self.tokens += len(x)
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self.magnitude = magnitude if self.magnitude is None else self.magnitude + magnitude
        if self.needs.hessian:
            self._add_squares(x)
        if self.needs.samples:
            self._sample(x, step)
        self.seen[step] = self.seen.get(step, 0) + len(x)

    def _add_squares(self, x: Tensor) -> None:
        width = x.shape[1]
        if self._lower is None:
            self._lower = torch.zeros(width, width)
        self._whole = False
        for start in range(0, width, _PANEL):
            panel = x[:, start : start + _PANEL]
            self._lower[start:, start : start + _PANEL].addmm_(x[:, start:].t(), panel)

    def _sample(self, x: Tensor, step: int | None) -> None:
        """Reservoir sampling (Vitter 1985, algorithm R)."""
        seen = self.seen.get(step, 0)
        room = max(0, MAX_SAMPLES - seen)
        if room:
            kept = self.samples.get(step, x[:0])
            self.samples[step] = torch.cat([kept, x[:room]])
        for offset in range(room, len(x)):
            place = int(torch.randint(seen + offset + 1, (1,), generator=self._generator))
            if place < MAX_SAMPLES:
                self.samples[step][place] = x[offset]
