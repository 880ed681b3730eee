from pathlib import Path

import pytest
import torch

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.pack.unfinished import Unfinished

TENSORS = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


def test_what_was_put_is_there(tmp_path: Path) -> None:
    Unfinished(tmp_path / "out", {"source": "x"}).put("block.0", [1], TENSORS)
    found = Unfinished(tmp_path / "out", {"source": "x"}).get("block.0", [1])
    assert found is not None and found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert not (tmp_path / "out").exists()


def test_what_was_read_outlives_its_file(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path / "out", {})
    kept.put("block.0", [1], TENSORS)
    found = kept.get("block.0", [1])
    kept.put("block.0", [1], {"a": torch.zeros(2, 3)})
    kept.remove()
    assert found is not None and torch.equal(found["a"], TENSORS["a"])


def test_what_was_made_from_something_else_is_not(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path / "out", {"source": "x"})
    kept.put("block.0", [1], TENSORS)
    assert kept.get("block.0", [2]) is None
    assert kept.get("block.1", [1]) is None


def test_another_run_does_not_go_on_with_it(tmp_path: Path) -> None:
    Unfinished(tmp_path / "out", {"source": "x", "observations": 1}).put("block.0", [1], TENSORS)
    with pytest.raises(CheckpointError, match=r"\.out\.unfinished holds the finished blocks .* another observations"):
        Unfinished(tmp_path / "out", {"source": "x", "observations": 2})
    assert Unfinished(tmp_path / "out", {"source": "x", "observations": 1}).get("block.0", [1]) is not None


def test_a_damaged_file_is_not(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path / "out", {})
    kept.put("block.0", [1], TENSORS)
    file = next(kept.directory.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    assert kept.get("block.0", [1]) is None


def test_nothing_is_left_when_it_is_removed(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path / "out", {})
    kept.remove()
    kept.put("block.0", [1], TENSORS)
    kept.remove()
    assert not list(tmp_path.iterdir())
