"""The papers' tables and figures, rebuilt on our own policy; `omega-qvla reproduce NAME` runs one.

The frame:
  study             cells that are computed once and kept, and a rendering of all that are finished
  bench             a floating-point policy, what it is calibrated on and what it is judged on
  twin              the same policy with the activation outliers of a released VLA
  rendering         tables, CSV files and plots
  published         what the papers print, kept apart from everything measured
  published_layers  the same for figures of layers

Studies of policies:
  main_comparison   every method at every width
  ablation          every piece of a recipe
  calibration_size  how many trajectories calibration needs
  traces            actions along an episode
  accumulation      how errors grow over an episode
  sweep             for these: cells that judge a recipe by its actions and in closed loop
  comparison        for these: statistics of such cells beside full precision, and their table

Studies of layers:
  weight_solver     rounding of weights
  rotation          outputs and largest inputs by rotation
  drift             inputs by denoising step
  surfaces          inputs by token and channel
  synthetic_layers  layers with published ratios of outliers
  bit_allocation    bits per output channel
  cells, layers     for these: cells that measure one recipe, and values by kind of layer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omega_qvla.studies.study import Study

_NAMES = (
    "main-comparison",
    "ablation",
    "calibration-size",
    "weight-solver",
    "rotation",
    "drift",
    "surfaces",
    "traces",
    "accumulation",
    "synthetic-layers",
    "bit-allocation",
)
"""Each is the `STUDY` of the module of that name."""


class _Studies(Mapping[str, "Study"]):
    """Imports a study when it is asked for: a worker process needs none but its own."""

    def __getitem__(self, name: str) -> Study:
        if name not in _NAMES:
            raise KeyError(name)
        study: Study = import_module(f"{__name__}.{name.replace('-', '_')}").STUDY
        return study

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)


STUDIES: Mapping[str, Study] = _Studies()
"""What can be reproduced, by name."""
