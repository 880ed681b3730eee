"""What stays in memory is told apart from what only could be read."""

import operator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omega_qvla.evaluation import memory
from omega_qvla.evaluation.memory import measure_resident_memory

SIZE = 64 * 2**20
SLACK = 4 * 2**20
"""What loading may take besides."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="read from Linux's /proc")


def test_what_is_allocated_is_anonymous() -> None:
    report = measure_resident_memory(partial(operator.mul, b"x", SIZE))
    assert abs(report.growth.anonymous - SIZE) < SLACK and abs(report.growth.file_backed) < SLACK
    assert report.loaded.total == report.imported.total + report.growth.total
    assert report.imported.total > 10 * SLACK  # torch itself


def test_what_is_mapped_is_resident_only_once_it_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    save_file({"x": torch.zeros(SIZE // 4)}, path)
    mapped = measure_resident_memory(partial(load_file, path), imports=("safetensors.torch",)).growth
    assert abs(mapped.total) < SLACK


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SMAPS", tmp_path / "smaps_rollup")
    with pytest.raises(OSError, match="smaps_rollup, which this system lacks; measure on Linux"):
        memory._measure((dict, ()))
