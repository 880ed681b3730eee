"""The three verbs."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import omega_qvla
from omega_qvla import api
from omega_qvla.pack.checkpoint import read_manifest, sha256
from omega_qvla.pack.manifest import CheckpointError


def test_the_room_of_a_verbs_name_does_not_hide_the_verb() -> None:
    code = "import omega_qvla; verb = omega_qvla.quantize; import omega_qvla.quantization.driver; "
    code += "assert omega_qvla.quantize is verb and callable(verb)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_manifest_names_its_origin(
    checkpoint: Path, quantized: Callable[[str], Path], calibration: api.CalibrationSet
) -> None:
    manifest = read_manifest(quantized("omega-int4"))
    assert manifest.source.directory == checkpoint.name
    assert manifest.source.sha256["model.safetensors"] == sha256(checkpoint / "model.safetensors")
    assert manifest.calibration is not None
    assert manifest.calibration.trajectories == calibration.trajectories
    assert manifest.calibration.observations == 8
    assert manifest.versions["omega-qvla"] == omega_qvla.__version__
    assert read_manifest(quantized("rtn-w4a4")).calibration is None


def test_quantizing_leaves_the_source_alone(
    checkpoint: Path, calibration: api.CalibrationSet, tmp_path: Path
) -> None:
    before = {path: sha256(path) for path in checkpoint.rglob("*") if path.is_file()}
    api.quantize(checkpoint, "omega-int4", tmp_path / "out", calibration=calibration)
    assert {path: sha256(path) for path in checkpoint.rglob("*") if path.is_file()} == before


def test_it_is_reproducible(
    checkpoint: Path, quantized: Callable[[str], Path], calibration: api.CalibrationSet, tmp_path: Path
) -> None:
    for name in ("omega-int4", "omega-qvla"):
        again = api.quantize(checkpoint, name, tmp_path / name, calibration=calibration)
        assert again == read_manifest(quantized(name))


def test_unknown_tasks_and_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'fly-v3'"):
        api.evaluate([tmp_path], tasks=["fly-v3"])
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        api.load(tmp_path)
