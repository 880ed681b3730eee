"""How GR00T N1.5 normalizes states and actions, by what its training measured of each channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omega_qvla.pack.manifest import CheckpointError

Mode = Literal["min_max", "mean_std", "q99", "binary", "sin_cos"]
"""The names of NVIDIA's training code.

`min_max`: the range to -1..1, a constant channel to 0. `mean_std`: by mean and standard deviation. `q99`: the range
from the first to the last percentile to -1..1, what lies outside is cut off. `binary`: 0 or 1, on which side of 0.5
it is. `sin_cos`: an angle to its sine and cosine, of states only. The two others leave a constant channel as it is.
"""

_MEASURED: dict[Mode, tuple[str, ...]] = {
    "min_max": ("min", "max"),
    "mean_std": ("mean", "std"),
    "q99": ("q01", "q99"),
}


@dataclass(frozen=True)
class Normalization:
    """Of neighbouring channels of a state or an action."""

    mode: Mode
    width: int
    """The number of channels in physical units."""
    offset: Tensor
    """In physical units what a normalized 0 stands for, float32 [width]; not used by `binary` and `sin_cos`."""
    scale: Tensor
    """In physical units what a normalized 1 is above that, float32 [width]."""

    @classmethod
    def measured(
        cls, mode: Mode, width: int, statistics: Mapping[str, Sequence[float] | Tensor], where: str
    ) -> Normalization:
        """From the statistics of these channels, which `where` names for messages.

        Raises `CheckpointError` if a statistic that the mode needs is missing, of another length or not finite.
        """
        if mode not in _MEASURED:
            return cls(mode, width, torch.zeros(width), torch.ones(width))
        low, high = (_vector(statistics, name, width, where) for name in _MEASURED[mode])
        if mode == "mean_std":
            return cls(mode, width, low.float(), high.float())
        return cls(mode, width, ((low + high) / 2).float(), ((high - low) / 2).float())

    @property
    def normalized_width(self) -> int:
        return 2 * self.width if self.mode == "sin_cos" else self.width

    @property
    def limited(self) -> bool:
        """Whether physical units of -1 and 1 are the ends of what was measured, or the two positions of a switch."""
        return self.mode in ("min_max", "q99", "binary")

    def normalize(self, x: Tensor) -> Tensor:
        """Float32 [..., normalized width] of float32 [..., width] in physical units."""
        if self.mode == "sin_cos":
            return torch.cat([x.sin(), x.cos()], dim=-1)
        if self.mode == "binary":
            return (x > 0.5).to(x.dtype)
        varies = self.scale != 0
        scaled = (x - self.offset) / self.scale.where(varies, 1)
        normalized = scaled.where(varies, torch.zeros_like(x) if self.mode == "min_max" else x)
        return normalized.clamp(-1, 1) if self.mode == "q99" else normalized

    def physical(self, y: Tensor) -> Tensor:
        """Float32 [..., width] in physical units of as many normalized ones; not of `sin_cos`."""
        return (y > 0.5).to(y.dtype) if self.mode == "binary" else y * self.scale + self.offset


def _vector(statistics: Mapping[str, Sequence[float] | Tensor], name: str, width: int, where: str) -> Tensor:
    """A statistic in float64, so that differences of large numbers stay exact."""
    if name not in statistics:
        raise CheckpointError(f"{where} lacks {name}; copy it from the checkpoint that the training wrote")
    values = torch.as_tensor(statistics[name], dtype=torch.float64).flatten()
    if len(values) != width or not values.isfinite().all():
        raise CheckpointError(f"{where}: {name} is {values.tolist()} instead of {width} finite numbers; correct it")
    return values
