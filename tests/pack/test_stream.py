"""What is written tensor by tensor is what safetensors writes at once."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omega_qvla.pack import stream
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.pack.stream import DTYPES, TensorSource, opened, sources_in, write_tensors

SHAPES = {"scalar": (), "empty": (0, 3), "odd": (3, 5), "layer.0.ü": (7,), 'a "name"': (2, 2, 2)}
TENSORS = {
    f"{name}.{key}": torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)
    for key, dtype in DTYPES.items()
    for name, shape in SHAPES.items()
}


def one_by_one(tensors: dict[str, Tensor]) -> dict[str, TensorSource]:
    def source(tensor: Tensor) -> TensorSource:
        return TensorSource(tensor.dtype, tuple(tensor.shape), lambda: [tensor.clone()])

    return {name: source(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("metadata", [None, {"fingerprint": "é"}])
def test_the_same_bytes_as_safetensors(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs", metadata)
    write_tensors(tmp_path / "ours", TENSORS, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with opened(tmp_path / "ours") as file:
        assert (file.metadata() or None) == metadata


@pytest.mark.parametrize("piece", [8, 64, 2**22])
def test_however_it_is_read(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / "expected")
    monkeypatch.setattr(stream, "PIECE_BYTES", piece)
    backwards = dict(reversed(TENSORS.items()))
    for name, tensors in {
        "memory": backwards,
        "sources": one_by_one(backwards),
        "file": sources_in(tmp_path / "expected"),
    }.items():
        write_tensors(tmp_path / name, tensors)
        assert (tmp_path / name).read_bytes() == (tmp_path / "expected").read_bytes(), name
        sources = sources_in(tmp_path / name)
        assert all(part.nbytes <= piece for source in sources.values() for part in source.pieces())


def test_it_is_read_again(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS)
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in TENSORS.items())
    sources = sources_in(tmp_path / "file")
    assert {name: (s.dtype, s.shape, s.nbytes) for name, s in sources.items()} == {
        name: (x.dtype, tuple(x.shape), x.nbytes) for name, x in TENSORS.items()
    }


def test_views_and_parameters(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    write_tensors(tmp_path / "file", {"parameter": weight, "transposed": weight.t(), "column": weight[:, 1]})
    found = load_file(tmp_path / "file")
    assert torch.equal(found["parameter"], weight) and torch.equal(found["transposed"], weight.t())
    assert torch.equal(found["column"], weight[:, 1])


def test_no_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {})
    assert sources_in(tmp_path / "file") == load_file(tmp_path / "file") == {}


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read(value: int) -> Iterator[Tensor]:
        nonlocal most
        for _ in range(2):
            tensor = torch.full((4,), float(value))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            yield tensor
            del tensor

    def source(value: int) -> TensorSource:
        return TensorSource(torch.float32, (2, 4), lambda: read(value))

    write_tensors(tmp_path / "file", {f"t{i}": source(i) for i in range(5)})
    assert len(alive) == 10 and most <= 2
    found = load_file(tmp_path / "file")
    assert [found[f"t{i}"].unique().tolist() for i in range(5)] == [[i] for i in range(5)]


@pytest.mark.parametrize(
    ("announced", "message"),
    [
        ((torch.float32, (2, 3)), r"layer\.x has 20 bytes, announced with 24"),
        ((torch.float32, (4,)), r"layer\.x has 20 bytes, announced with 16"),
        ((torch.int32, (5,)), r"layer\.x is torch\.float32, announced as torch\.int32"),
        ((torch.complex64, (5,)), r"layer\.x has dtype torch\.complex64; a checkpoint holds BOOL, U8"),
    ],
)
def test_a_tensor_that_is_not_what_was_announced(
    announced: tuple[torch.dtype, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_tensors(tmp_path / "file", {"layer.x": TensorSource(*announced, lambda: [torch.zeros(5)])})


def test_a_dtype_that_no_checkpoint_holds(tmp_path: Path) -> None:
    save_file({"layer.x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"file: layer\.x has dtype F8_E4M3; there are BOOL, U8"):
        sources_in(tmp_path / "file")


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(json.dumps({"a": 1}).encode())
    with pytest.raises(CheckpointError, match="file is no safetensors file"):
        sources_in(tmp_path / "file")


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"a": torch.arange(100)})
    source = sources_in(tmp_path / "file")["a"]
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="file became shorter while it was read; leave it alone"):
        list(source.pieces())
