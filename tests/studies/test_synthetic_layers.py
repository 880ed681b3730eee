"""The published order of rotations on layers with the published channel ratios, and how the layers are made."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from omega_qvla.spec import read_recipe, with_settings
from omega_qvla.studies.published_layers import ROTATIONS, RotatedLayer, published_layers
from omega_qvla.studies.study import Options, Result
from omega_qvla.studies.synthetic_layers import (
    DRIFT,
    LAYERS,
    METHODS,
    ORDERINGS,
    SEEDS,
    STEPS,
    STUDY,
    SyntheticLayer,
    inputs,
    layer_error,
    recipes,
)

SMALL = {layer: replace(layer, width=256, tokens=64) for layer in LAYERS}


@cache
def errors(layer: SyntheticLayer) -> dict[str, float]:
    """Output error of the small layer under RTN with each rotation."""
    return {kind: layer_error(recipes()[f"rtn-{kind}"], SMALL[layer], seed=0) for kind in ROTATIONS}


@pytest.mark.parametrize(
    "layer", [layer for layer in LAYERS if layer.kind == "down_proj"], ids=lambda layer: layer.label
)
def test_svd_alone_hurts_at_outliers(layer: SyntheticLayer) -> None:
    found = errors(layer)
    assert found["svd"] > found["none"] and found["svd"] > found["svd_hadamard"]


@pytest.mark.parametrize(
    "layer", [layer for layer in LAYERS if layer.kind == "q_proj"], ids=lambda layer: layer.label
)
def test_rotation_helps_queries(layer: SyntheticLayer) -> None:
    found = errors(layer)
    assert found["svd_hadamard"] < found["svd"] < found["none"]


def test_every_published_ordering_holds() -> None:
    layers = [RotatedLayer(layer.label, layer.ratio, tuple(errors(layer).values())) for layer in LAYERS]
    assert all(holds(layers) for holds in ORDERINGS.values())


def test_what_the_published_layers_show() -> None:
    """All orderings hold on pi0.5; on GR00T N1.5 a gate_proj gains more than the q_proj."""
    holding = {t.policy: [holds(t.layers) for holds in ORDERINGS.values()] for t in published_layers()}
    assert holding == {"pi0.5": [True, True, True, True], "GR00T N1.5": [True, True, True, False]}


def test_inputs_have_the_ratio_and_the_drift() -> None:
    layer = SyntheticLayer("action", "down_proj", 80.0, width=512, tokens=2000)
    tokens = inputs(layer, torch.Generator().manual_seed(0))
    assert list(tokens) == list(range(STEPS))
    deviation = [tokens[step].std(0) for step in (0, STEPS - 1)]
    assert (deviation[1] / deviation[0]).mean().item() == pytest.approx(1 - DRIFT, rel=0.02)
    assert (deviation[0].max() / deviation[0].median()).item() == pytest.approx(80, rel=0.1)
    assert (deviation[0] > 40 * deviation[0].median()).sum() == 6  # 12 of 1024
    assert list(inputs(SyntheticLayer("language", "q_proj", 12.4), torch.Generator())) == [None]


def test_more_bits_err_less() -> None:
    eight = with_settings(read_recipe("rtn"), ["weight.bits=8", "activation.bits=8"])
    assert layer_error(eight, SMALL[LAYERS[0]], seed=0) < 0.1 * errors(LAYERS[0])["none"]


def fake_results(options: Options) -> dict[str, Result]:
    """0.1 for every layer without rotation, 0.2 with SVD, and 0.05 for all other variants."""
    values = {"rtn-none": 0.1, "rtn-svd": 0.2}
    return {
        cell.key: {
            "variant": cell.key,
            "label": cell.what["recipe"]["name"],
            "nmse": [[values.get(cell.key, 0.05)] * len(SEEDS) for _ in LAYERS],
        }
        for cell in STUDY.cells(options)
    }


def test_every_variant_rounds_both_parts_to_four_bits() -> None:
    for recipe in recipes().values():
        specs = {rule.part: rule.quantize for rule in recipe.rules if rule.quantize is not None}
        assert {(part, spec.weight.bits, spec.activation.bits) for part, spec in specs.items()} == {
            ("language", 4, 4),
            ("action", 4, 4),
        }
    assert METHODS.keys() <= recipes().keys()


def test_rendering(options: Options, tmp_path: Path) -> None:
    results = fake_results(options)
    STUDY.render(results, tmp_path)
    text = (tmp_path / "synthetic-layers.md").read_text()
    measured, published = text.split("Published, not measured here")
    assert "orderings of the published layers 4 hold here" in measured and "GR00T" in published
    assert (tmp_path / "synthetic-layers.svg").exists()
    assert len((tmp_path / "synthetic-layers.csv").read_text().splitlines()) == 1 + 6 * len(SEEDS) * len(results)


def test_rotations_that_are_missing_are_not_ordered(options: Options, tmp_path: Path) -> None:
    results = fake_results(options)
    del results["rtn-svd"]
    STUDY.render(results, tmp_path)
    assert "Some rotations are missing" in (tmp_path / "synthetic-layers.md").read_text()
