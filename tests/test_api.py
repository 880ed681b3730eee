"""The three verbs."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import omega_qvla
from omega_qvla import api
from omega_qvla.calibration import CalibrationError
from omega_qvla.pack.checkpoint import read_manifest, sha256
from omega_qvla.pack.manifest import CheckpointError, PlannedSite
from omega_qvla.pack.site import PackedSite
from omega_qvla.policy import Observation
from omega_qvla.quantization import driver
from omega_qvla.quantization.site import quantize_site
from omega_qvla.spec import LinearSpec, read_recipe, with_settings


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
    assert read_manifest(quantized("rtn")).calibration is None


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


def test_a_run_that_failed_goes_on_where_it_stopped(
    checkpoint: Path,
    quantized: Callable[[str], Path],
    calibration: api.CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the bits of a run that nothing disturbed, and nothing left beside the checkpoint."""
    done: list[str] = []

    def until(stop: int) -> Callable[..., PackedSite]:
        def quantize_next(site: PlannedSite, *arguments: Any) -> PackedSite:
            if len(done) == stop:
                raise CalibrationError(f"{site.name}: this layer is difficult")
            done.append(site.name)
            return quantize_site(site, *arguments)

        return quantize_next

    out = tmp_path / "out"
    monkeypatch.setattr(driver, "quantize_site", until(6))  # in the middle of the second of four blocks
    with pytest.raises(CalibrationError, match=r"layers\.1\..*difficult; finished blocks are kept"):
        api.quantize(checkpoint, "omega-int4", out, calibration=calibration)
    assert not out.exists()
    monkeypatch.setattr(driver, "quantize_site", until(100))
    api.quantize(checkpoint, "omega-int4", out, calibration=calibration)
    assert len(done) == 6 + 12
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path in quantized("omega-int4").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (out / path.relative_to(quantized("omega-int4"))).read_bytes()


def test_what_the_recipe_changes_for_a_block_is_made_again(
    checkpoint: Path, calibration: api.CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def quantize_most(site: PlannedSite, spec: LinearSpec, *arguments: Any) -> PackedSite:
        if site.part == "action" and spec.weight.bits == 4:
            raise CalibrationError(f"{site.name}: four bits are too few")
        done.append(site.part)
        return quantize_site(site, spec, *arguments)

    monkeypatch.setattr(driver, "quantize_site", quantize_most)
    with pytest.raises(CalibrationError, match="four bits are too few"):
        api.quantize(checkpoint, "gptq", tmp_path / "out", calibration=calibration)
    wider = with_settings(read_recipe("gptq"), ["action.weight.bits=8"])
    api.quantize(checkpoint, wider, tmp_path / "out", calibration=calibration)
    assert done == ["language"] * 8 + ["action"] * 8


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from omega_qvla import api
from omega_qvla.pack import checkpoint, unfinished
from omega_qvla.policy import Observation
source, out, file, moment = sys.argv[1:]
data = np.load(file)
images = {name: data[name] for name in ("back", "front")}
observations = Observation(images, data["state"], tuple(data["instructions"].tolist()))
moments = iter(range(int(moment)))


def mortal(function):
    def called(*arguments, **options):
        if next(moments, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return called


# Before a block's file is put in its place, while tensors are written, and before the checkpoint is.
unfinished.os.replace = mortal(os.replace)
checkpoint.write_tensors = mortal(checkpoint.write_tensors)
checkpoint.os.rename = mortal(os.rename)
calibration = api.CalibrationSet(observations, ("random:1",))
api.quantize(Path(source), "omega-int4", Path(out), calibration=calibration, memory_budget=2**40)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_files(
    checkpoint: Path, calibration: api.CalibrationSet, observations: Observation, tmp_path: Path
) -> None:
    undisturbed = tmp_path / "undisturbed"
    api.quantize(checkpoint, "omega-int4", undisturbed, calibration=calibration, memory_budget=2**40)
    file, out = tmp_path / "observations.npz", tmp_path / "out"
    data = {"state": observations.state, **observations.images}
    np.savez(file, instructions=np.array(observations.instructions), **data)
    killed = 0
    for moment in (2, 4, 100):  # in the second of four blocks, and before the finished checkpoint is put in its place
        run = subprocess.run([sys.executable, "-c", KILLED, str(checkpoint), str(out), str(file), str(moment)])
        killed += run.returncode == -signal.SIGKILL
        assert out.exists() == (moment == 100)
    assert killed == 2
    assert {path.name for path in tmp_path.iterdir()} == {"undisturbed", "out", "observations.npz"}
    for path in undisturbed.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (out / path.relative_to(undisturbed)).read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is truncated"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes((10**12).to_bytes(8, "little") + b"{}"), "is truncated"),
        (lambda file: changed(file, "gemma_expert.lm_head.weight", None), "lacks .*gemma_expert"),
        (lambda file: changed(file, "gemma_expert.model.norm.dense.bias", torch.zeros(3)), "dense.bias has shape"),
        (lambda file: changed(file, "surplus.weight", torch.zeros(3)), "holds surplus.weight"),
        (lambda file: changed(file, "action_in_proj.bias", torch.full((128,), torch.nan)), "contains NaN"),
        (lambda file: changed(file, "time_mlp_in.bias", torch.zeros(128).to(torch.float8_e4m3fn)), "of dtype F8"),
    ],
)
@pytest.mark.parametrize("budget", [None, 2**40])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_left(
    checkpoint: Path,
    calibration: api.CalibrationSet,
    tmp_path: Path,
    damage: Callable[[Path], object],
    message: str,
    budget: int | None,
) -> None:
    shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(tmp_path / "damaged" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        api.quantize(
            tmp_path / "damaged", "omega-int4", tmp_path / "out", calibration=calibration, memory_budget=budget
        )
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def changed(file: Path, ending: str, value: torch.Tensor | None) -> None:
    """One tensor of a checkpoint taken out, put in, or replaced."""
    tensors = load_file(file)
    name = next((name for name in tensors if name.endswith(ending)), ending)
    tensors.pop(name, None)
    save_file(tensors | ({} if value is None else {name: value}), file, metadata={"format": "pt"})
