"""What rotations do to row maxima, and the figures that were published about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omega_qvla.numerics.rotation import apply_blocks, hadamard
from omega_qvla.studies import rotation
from omega_qvla.studies.published_layers import published_layers
from omega_qvla.studies.rotation import LABELS, STUDY, recipe, row_maximum
from omega_qvla.studies.study import Result


@pytest.fixture(scope="module")
def results(computed: Callable[..., dict[str, Result]]) -> dict[str, Result]:
    return computed(rotation)


def test_row_maximum_is_a_percentile_over_tokens() -> None:
    x = torch.zeros(200, 64)
    x[:, 3] = -torch.arange(1.0, 201.0)
    assert row_maximum(x) == 198  # two of 200 tokens are larger


def test_hadamard_spreads_a_single_channel() -> None:
    x = torch.zeros(10, 64)
    x[:, 5] = 8.0
    rotated = apply_blocks(x, hadamard(64)[None])
    assert row_maximum(rotated) == pytest.approx(row_maximum(x) / 64**0.5)


def test_recipes_differ_in_the_rotation_alone() -> None:
    specs = [[rule.quantize for rule in recipe(kind).rules if rule.quantize is not None] for kind in LABELS]
    for kind, pair in zip(LABELS, specs, strict=True):
        assert {spec.transform.rotation for spec in pair} == {kind}
        assert {(spec.weight.bits, spec.activation.bits, spec.activation.granularity) for spec in pair} == {
            (4, 4, "token")
        }


def test_no_rotation_leaves_row_maxima_as_they_are(results: dict[str, Result]) -> None:
    """A permutation does not change the largest entry of a token."""
    for layer in results["policy-none"]["layers"]:
        assert layer["row_max_ratio"] == 1
    assert any(layer["row_max_ratio"] != 1 for layer in results["policy-svd_hadamard"]["layers"])
    assert all(len(result["layers"]) == 28 for result in results.values())


def test_rendering(results: dict[str, Result], tmp_path: Path) -> None:
    STUDY.render(results, tmp_path)
    text = (tmp_path / "rotation.md").read_text()
    assert text.index("Published, not measured here") > text.index("## twin")
    assert {path.name for path in tmp_path.glob("rotation*.svg")} == {"rotation.svg", "rotation-published.svg"}
    STUDY.render({"twin-svd": results["twin-svd"]}, tmp_path)
    assert "Some rotations are missing" in (tmp_path / "rotation.md").read_text()


def test_published_figures_are_those_of_the_paper_text() -> None:
    """Ω-QVLA Appendix A.5 quotes some of the numbers behind Figure 6."""
    groot = {layer.layer: layer for table in published_layers() if "GR00T" in table.policy for layer in table.layers}
    assert groot["language 2 q_proj"].nmse[1:] == pytest.approx((0.139, 0.028), abs=5e-4)
    assert groot["action 2 q_proj"].nmse[1:] == pytest.approx((0.051, 0.019), abs=5e-4)
    assert groot["language 2 down_proj"].nmse == pytest.approx((0.001, 0.148, 0.056), abs=5e-4)
    assert groot["language 2 down_proj"].channel_ratio > 5e4
    least = [min(layer.nmse) == layer.nmse[2] for layer in groot.values()]
    assert least.count(True) == 9 and len(least) == 10
