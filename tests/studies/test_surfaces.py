"""Which layer is shown, and what its transforms do to the peak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla.studies import surfaces
from omega_qvla.studies.study import Result
from omega_qvla.studies.surfaces import CHANNELS, STUDY, TOKENS, TRANSFORMS, channel_ratio, surface
from omega_qvla.studies.workbench import Workbench


@pytest.fixture(scope="module")
def results(computed: Callable[..., dict[str, Result]]) -> dict[str, Result]:
    return computed(surfaces)


def test_channel_ratio_of_a_planted_outlier() -> None:
    x = torch.ones(10, 65)
    x[3, 7] = -40.0
    assert channel_ratio(x) == 40


def test_surface_keeps_peaks_of_neighbouring_channels() -> None:
    x = torch.randn(TOKENS, 4 * CHANNELS, generator=torch.Generator().manual_seed(0))
    shown = surface(x)
    assert shown.shape == (TOKENS, CHANNELS) and shown.max() == x.abs().max()
    assert shown[2, 1] == x[2, 4:8].abs().max()
    assert surface(x[:5, :64]).shape == (5, 64)
    np.testing.assert_array_equal(surface(x[:5, :64]), x[:5, :64].abs())


def test_the_most_uneven_layer_of_each_part_is_shown(results: dict[str, Result], bench: Workbench) -> None:
    for layer in results["policy"]["layers"]:
        part, depth, kind = layer["layer"].split()
        ratios = {
            name: channel_ratio(torch.cat(list(bench.inputs[name].values())))
            for name, found in bench.layers.items()
            if found.part == part
        }
        chosen = next(n for n, f in bench.layers.items() if (f.part, str(f.depth), f.kind) == (part, depth, kind))
        assert ratios[chosen] == max(ratios.values())
        assert layer["channels"] == bench.inputs[chosen][None if part == "language" else 0].shape[1]


def test_peaks(results: dict[str, Result]) -> None:
    """A permutation keeps the peak, and a rotation of blocks of 64 divides it by 8 at most."""
    for layer in results["policy"]["layers"]:
        peaks = {panel["transform"]: panel["peak"] for panel in layer["panels"]}
        assert list(peaks) == list(TRANSFORMS)
        assert peaks["permutation"] == peaks["identity"]
        assert peaks["SVD·H"] > peaks["identity"] / 8.1
        shown = [np.loadtxt(panel["surface"], ndmin=2).max() for panel in layer["panels"]]
        assert all(0 < value <= 1.05 * peak for value, peak in zip(shown, peaks.values(), strict=True))


def test_rendering(results: dict[str, Result], tmp_path: Path) -> None:
    STUDY.render(results, tmp_path)
    text = (tmp_path / "surfaces.md").read_text()
    assert text.count("| twin |") == 2 * len(TRANSFORMS)
    assert (tmp_path / "surfaces.csv").exists() and (tmp_path / "surfaces.svg").exists()
    STUDY.render({"twin": results["twin"]}, tmp_path)
    assert "| policy |" not in (tmp_path / "surfaces.md").read_text()
