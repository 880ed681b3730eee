"""A cell judges what its recipe makes of the policy, and its description says what it depends on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler  # what carries a cell to a worker process
from pathlib import Path

import pytest

from omega_qvla import api
from omega_qvla.evaluation.fidelity import action_fidelity, predict
from omega_qvla.pack.inspect import inspect
from omega_qvla.spec import read_recipe, recipe_to_dict, with_settings
from omega_qvla.studies.study import Options
from omega_qvla.studies.sweep import Variant, digest, evaluation_episodes, full_precision, judge, variant_cell
from omega_qvla.studies.workbench import Workbench

RTN = Variant("rtn-w4a4", "rtn W4A4", read_recipe("rtn"), layers=True)


@pytest.fixture(scope="module")
def judged(bench: Workbench, checkpoint: Path, calibration: api.CalibrationSet) -> dict[str, object]:
    return judge(bench, "tiny", checkpoint, RTN, calibration, ())


def test_a_recipe_is_judged_as_its_checkpoint(
    judged: dict[str, object], bench: Workbench, checkpoint: Path, tmp_path: Path
) -> None:
    api.quantize(checkpoint, read_recipe("rtn"), tmp_path / "rtn")
    report = inspect(tmp_path / "rtn")
    size = judged["bytes"]
    assert isinstance(size, dict)
    assert (size["codes"], size["scales"]) == (report.codes_bytes, report.scales_bytes)
    assert judged["execution"] == "integer" and judged["recipe"] == recipe_to_dict(read_recipe("rtn"))
    policy = api.load(tmp_path / "rtn", "simulated")
    wanted = action_fidelity(bench.reference, predict(policy, bench.held_out))
    assert judged["action_nmse"] == pytest.approx(wanted.normalized_mse, rel=1e-6)
    assert judged["episodes"] == []


def test_layers_are_compared_by_part_and_kind(judged: dict[str, object]) -> None:
    layers = judged["layer_nmse"]
    assert isinstance(layers, dict)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert set(layers) == {f"{part} {kind}" for part in ("language", "action") for kind in kinds}
    assert all(0 < error < 1 for error in layers.values())


def test_more_bits_are_nearer(
    judged: dict[str, object], bench: Workbench, checkpoint: Path, calibration: api.CalibrationSet
) -> None:
    wide = with_settings(read_recipe("rtn"), ["weight.bits=8", "activation.bits=8"])
    found = judge(bench, "tiny", checkpoint, Variant("w8a8", "W8A8", wide), calibration, ())
    error = judged["action_nmse"]
    assert isinstance(error, float) and found["action_nmse"] < error / 10
    assert found["layer_nmse"] is None


def test_full_precision_has_bytes_and_no_error(
    bench: Workbench, checkpoint: Path, calibration: api.CalibrationSet
) -> None:
    found = judge(bench, "tiny", checkpoint, full_precision(0), calibration, ())
    assert found["recipe"] is None and "action_nmse" not in found
    assert found["bytes"]["total"] == sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def test_episodes_start_with_the_first_seed_of_every_task() -> None:
    both = ("reach-v3", "push-v3")
    assert evaluation_episodes(both, 2) == tuple((task, seed) for seed in (0, 1) for task in both)
    assert evaluation_episodes(both, 0) == ()
    with pytest.raises(ValueError, match="evaluation seed"):
        evaluation_episodes(both, 100_001)
    with pytest.raises(ValueError, match="unknown task 'reach'; MT10 has reach-v3"):
        evaluation_episodes(("reach",), 0)


def test_descriptions_say_what_a_cell_depends_on(checkpoint: Path, tmp_path: Path) -> None:
    options = Options(tmp_path, {"tiny": checkpoint}, ("reach-v3",))
    first = variant_cell(options, "tiny", RTN)
    assert first.key == "tiny-rtn-w4a4" and ForkingPickler.loads(ForkingPickler.dumps(first)).what == first.what
    recipe = with_settings(read_recipe("rtn"), ["weight.bits=3"], RTN.label)
    others = [
        variant_cell(options, "tiny", Variant(RTN.key, RTN.label, recipe, layers=True)),
        variant_cell(options, "tiny", Variant(RTN.key, RTN.label, RTN.recipe, 1, layers=True)),
        variant_cell(options, "tiny", Variant(RTN.key, RTN.label, RTN.recipe)),
    ]
    assert all(other.key == first.key and other.what != first.what for other in others)
    reworded = replace(read_recipe("rtn"), summary="in other words")
    assert variant_cell(options, "tiny", Variant(RTN.key, RTN.label, reworded, layers=True)).what == first.what


def test_the_digest_is_of_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "other")
    with (tmp_path / "other" / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert digest(tmp_path / "other") != digest(checkpoint)
