"""Tensors are read as they are stored, one at a time, and a malformed checkpoint is refused before anything is
allocated."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.stored import INDEX_FILE, WEIGHTS_FILE, StoredTensors

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GENERATOR = torch.Generator().manual_seed(0)
SHARDS: dict[str, dict[str, Tensor]] = {
    FIRST: {
        "embed.weight": torch.randn(50, 6, generator=GENERATOR).to(torch.bfloat16),
        "norm.weight": torch.randn(6, generator=GENERATOR),
    },
    SECOND: {
        "head.weight": torch.randn(3, 6, generator=GENERATOR).to(torch.float16),
        "scale": torch.tensor(2.5),
    },
}
TENSORS = {name: tensor for shard in SHARDS.values() for name, tensor in shard.items()}
PLACES = {name: file for file, tensors in SHARDS.items() for name in tensors}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    directory = tmp_path / "single"
    directory.mkdir()
    save_file(TENSORS, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    directory.mkdir()
    for file, tensors in SHARDS.items():
        save_file(tensors, directory / file, metadata={"format": "pt"})
    write_index(directory, PLACES)
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_raw(path: Path, header: bytes | dict[str, Any], data: bytes, length: int | None = None) -> None:
    """A safetensors file with any header, which says of itself that it has any `length`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(shape: list[Any], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_every_way_of_reading_gives_what_was_stored(layout: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(layout)
    stored = StoredTensors.open(directory)
    assert sorted(stored.names()) == sorted(TENSORS) and len(stored) == len(TENSORS)
    for name, tensor in TENSORS.items():
        assert name in stored and stored.shape(name) == tensor.shape and stored.dtype(name) == tensor.dtype
        assert_same(stored.read(name), tensor)
        assert_same(stored.mapped(name), tensor)
    stored.require(SHAPES)
    stored.check_finite()


def test_what_is_read_stays_when_the_file_changes_and_changes_nothing_in_it(single: Path) -> None:
    content = (single / WEIGHTS_FILE).read_bytes()
    stored = StoredTensors.open(single)
    read, mapped = stored.read("embed.weight"), stored.mapped("embed.weight")
    read.zero_()
    mapped.zero_()
    assert (single / WEIGHTS_FILE).read_bytes() == content
    read = stored.read("embed.weight")
    with (single / WEIGHTS_FILE).open("r+b") as file:  # in place, where a mapping would see it
        file.write(b"\0" * len(content))
    assert_same(read, TENSORS["embed.weight"])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux for the open mappings")
def test_only_a_mapping_that_was_asked_for_is_kept_open(single: Path) -> None:
    def mappings() -> int:
        return Path("/proc/self/smaps").read_text().count(str(single / WEIGHTS_FILE))

    stored = StoredTensors.open(single)
    kept = stored.read("embed.weight")
    stored.check_finite()
    assert len(kept) and mappings() == 0
    mapped = stored.mapped("embed.weight")
    assert mappings() == 1
    del mapped
    assert mappings() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """In a tensor longer than what is read at once, by an odd number of values."""
    large = torch.randn((1 << 21) + 33, generator=GENERATOR).to(dtype)
    for place in (None, 0, 1000, -1):
        tensor = large.clone()
        if place is not None:
            tensor[place] = bad
        save_file({"large": tensor}, tmp_path / WEIGHTS_FILE)
        stored = StoredTensors.open(tmp_path)
        if place is None:
            stored.check_finite()
            assert_same(stored.read("large"), large)
            continue
        for look in (stored.check_finite, partial(stored.read, "large")):
            with pytest.raises(CheckpointError, match=r"model\.safetensors: large contains NaN or infinity"):
                look()


def test_other_names(single: Path) -> None:
    stored = StoredTensors.open(single).renamed(lambda name: f"model.{name}")
    stored.require({f"model.{name}": shape for name, shape in SHAPES.items()})
    assert_same(stored.read("model.scale"), TENSORS["scale"])
    assert stored.where("model.scale") == f"{single / WEIGHTS_FILE}: scale"
    assert "scale" not in stored
    with pytest.raises(CheckpointError, match=r"model\.safetensors: \S+ and \S+ both stand for x; remove one"):
        stored.renamed(lambda name: "x")


def test_tied_tensors(single: Path) -> None:
    stored = StoredTensors.open(single).with_copies(
        {"tied.weight": "head.weight", "scale": "norm.weight", "absent": "nowhere"}
    )
    assert_same(stored.read("tied.weight"), TENSORS["head.weight"])
    assert_same(stored.read("scale"), TENSORS["scale"])  # present: no copy
    stored.require(SHAPES | {"tied.weight": SHAPES["head.weight"]})


def test_a_file_that_shrinks_meanwhile(single: Path) -> None:
    stored = StoredTensors.open(single)
    os.truncate(single / WEIGHTS_FILE, 64)
    with pytest.raises(CheckpointError, match=r"embed\.weight could not be read to its end: the file changed"):
        stored.read("embed.weight")


def test_unknown_names(single: Path) -> None:
    stored = StoredTensors.open(single)
    for ask in (stored.shape, stored.dtype, stored.where, stored.read, stored.mapped):
        with pytest.raises(CheckpointError, match=r"model\.safetensors lacks surprise"):
            ask("surprise")


def test_a_hub_cache_keeps_shards_elsewhere(sharded: Path, tmp_path: Path) -> None:
    """There, the files of a snapshot are links to blobs."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate([*SHARDS, INDEX_FILE]):
        (sharded / file).rename(blobs / str(number))
        (snapshot / file).symlink_to(Path("..", "..", "blobs", str(number)))
    assert_same(StoredTensors.open(snapshot).read("scale"), TENSORS["scale"])


# What is refused


def refusal(directory: Path) -> str:
    """The sentence with which a checkpoint that should hold TENSORS is refused."""
    with pytest.raises(CheckpointError) as caught:
        stored = StoredTensors.open(directory)
        stored.require(SHAPES)
        stored.check_finite()
    sentence = str(caught.value)
    assert "\n" not in sentence and str(directory) in sentence
    return sentence


ONE = {"w": entry([2], 0, 8)}
HEADERS: dict[str, tuple[bytes | dict[str, Any], bytes, int | None, str]] = {
    "a header beyond the file": (ONE, bytes(8), 10**9, "its header is not complete"),
    "a header of 2^63 bytes": (ONE, bytes(8), 2**63, "its header is not complete"),
    "no JSON": (b"no JSON at all", bytes(8), None, "is not JSON"),
    "no UTF-8": (b'{"\xff": 1}', bytes(8), None, "is not JSON"),
    "a list": (b"[]", b"", None, "holds no JSON object"),
    "deep": (b"[" * 100_000, b"", None, "is not JSON"),
    "a number in place of a tensor": ({"w": 1}, bytes(8), None, "w is not described by"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), None, "w is not described by"),
    "negative offsets": ({"w": entry([2], -8, 0)}, bytes(8), None, "w is not described by"),
    "backward offsets": ({"w": entry([2], 8, 0)}, bytes(8), None, "w is not described by"),
    "a truncated tensor": ({"w": entry([4], 0, 16)}, bytes(8), None, "truncated .* it ends before w does"),
    "10^12 elements": ({"w": entry([10**12], 0, 4 * 10**12)}, bytes(8), None, "it ends before w does"),
    "10^12 elements in 8 bytes": ({"w": entry([10**12], 0, 8)}, bytes(8), None, "w has 8 bytes, which do not hold"),
    "more than 2^64 elements": (
        {"w": entry([2**40, 2**40], 0, 8)},
        bytes(8),
        None,
        "w has 8 bytes, which do not hold",
    ),
    "a wrong shape": (
        {"w": entry([3], 0, 8)},
        bytes(8),
        None,
        r"w has 8 bytes, which do not hold F32 of shape \[3\]",
    ),
    "a negative shape": ({"w": entry([-2], 0, 8)}, bytes(8), None, r"do not hold F32 of shape \[-2\]"),
    "a fractional shape": ({"w": entry([2.0], 0, 8)}, bytes(8), None, r"do not hold F32 of shape \[2\.0\]"),
    "overlap": (ONE | {"v": entry([2], 4, 12)}, bytes(12), None, "v overlaps another tensor or lies behind a gap"),
    "the same place": (ONE | {"v": entry([2], 0, 8)}, bytes(8), None, "overlaps another tensor"),
    "a gap": (ONE | {"v": entry([2], 12, 20)}, bytes(20), None, "v overlaps another tensor or lies behind a gap"),
    "more bytes": (ONE, bytes(18), None, "has 10 bytes that belong to no tensor"),
    "an unknown dtype": ({"w": entry([2], 0, 8, "F31")}, bytes(8), None, "w is of dtype F31; supported: F32"),
}
"""Header, data, the header's stated length, and what is said. safetensors refuses these too."""

ALSO_REFUSED: dict[str, tuple[bytes | dict[str, Any], bytes, int | None, str]] = {
    "8-bit floats": ({"w": entry([8], 0, 8, "F8_E4M3")}, bytes(8), None, "w is of dtype F8_E4M3; supported: F32"),
    "integers": ({"w": entry([1], 0, 8, "I64")}, bytes(8), None, "w is of dtype I64; supported: F32"),
    "an empty tensor": (
        {"w": entry([0, 3], 0, 0)},
        b"",
        None,
        r"w has 0 bytes, which do not hold F32 of shape \[0, 3\]",
    ),
    "a key twice": (
        b'{"w": %b, "w": %b}' % tuple(json.dumps(entry(shape, 0, 8)).encode() for shape in ([2, 1], [1, 2])),
        bytes(8),
        None,
        "w is stated twice",
    ),
}


@pytest.mark.parametrize("case", HEADERS | ALSO_REFUSED)
def test_malformed_headers(case: str, tmp_path: Path) -> None:
    *content, message = (HEADERS | ALSO_REFUSED)[case]
    write_raw(tmp_path / WEIGHTS_FILE, *content)
    assert re.search(rf"{WEIGHTS_FILE}.*{message}", refusal(tmp_path))
    if case in HEADERS:
        with pytest.raises(SafetensorError):
            safe_open(tmp_path / WEIGHTS_FILE, "pt")


@pytest.mark.parametrize("size", [0, 5, 8, 60, -1])
def test_truncated_files(size: int, single: Path) -> None:
    content = (single / WEIGHTS_FILE).read_bytes()
    (single / WEIGHTS_FILE).write_bytes(content[:size])
    assert re.search(rf"{WEIGHTS_FILE} is truncated or no safetensors file", refusal(single))


def with_tensors(file: str, **changes: Tensor | None) -> Callable[[Path], None]:
    """The tensors of a file, with these instead or, where None, without."""

    def change(directory: Path) -> None:
        names = {name.replace("_", "."): tensor for name, tensor in changes.items()}
        tensors = {
            name: tensor for name, tensor in (load_file(directory / file) | names).items() if tensor is not None
        }
        save_file(tensors, directory / file)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_tensors(WEIGHTS_FILE, scale=None), r"model\.safetensors lacks scale and 0 other tensors"),
        (
            with_tensors(WEIGHTS_FILE, more=torch.ones(1)),
            r"model\.safetensors holds more and 0 other tensors unknown",
        ),
        (
            with_tensors(WEIGHTS_FILE, scale=torch.ones(2)),
            r"model\.safetensors: scale has shape \[2\] instead of \[\]",
        ),
        (with_tensors(WEIGHTS_FILE, scale=torch.tensor(math.nan)), r"model\.safetensors: scale contains NaN"),
        (
            with_tensors(WEIGHTS_FILE, norm_weight=torch.full((6,), -math.inf, dtype=torch.float16)),
            r"model\.safetensors: norm\.weight contains NaN or infinity",
        ),
        (
            lambda d: (d / WEIGHTS_FILE).unlink(),
            r"model\.safetensors is missing, and so is model\.safetensors\.index",
        ),
        (
            lambda d: write_index(d, {}),
            r"holds both model\.safetensors and model\.safetensors\.index\.json; remove one",
        ),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[Path], None], message: str, single: Path) -> None:
    change(single)
    assert re.search(message, refusal(single))


def indexed(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: write_index(directory, PLACES | changes)


def outside(link: bool) -> Callable[[Path], None]:
    """A shard that lies beside the directory and is named with `..`, or by a link."""

    def change(directory: Path) -> None:
        (directory / SECOND).rename(directory.parent / SECOND)
        if link:
            (directory / SECOND).symlink_to(directory.parent / SECOND)
        else:
            write_index(directory, {name: file.replace(SECOND, f"../{SECOND}") for name, file in PLACES.items()})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / SECOND).unlink(), rf"{SECOND} is missing, where {INDEX_FILE} places scale"),
        (lambda d: os.truncate(d / SECOND, 200), rf"{SECOND} is truncated or no safetensors file"),
        (with_tensors(FIRST, norm_weight=None), rf"{FIRST} lacks norm\.weight, which {INDEX_FILE} places there"),
        (with_tensors(FIRST, more=torch.ones(1)), rf"{FIRST} holds more, which {INDEX_FILE} places nowhere"),
        (with_tensors(FIRST, scale=torch.ones(1)), rf"{FIRST} holds scale, which {INDEX_FILE} places in {SECOND}"),
        (with_tensors(SECOND, scale=torch.tensor(math.inf)), rf"{SECOND}: scale contains NaN or infinity"),
        (indexed(more=FIRST), rf"{FIRST} lacks more, which {INDEX_FILE} places there"),
        (indexed(more="third"), rf"third is missing, where {INDEX_FILE} places more"),
        (indexed(more=""), rf"{INDEX_FILE} places more in ''; shards must lie beside it"),
        (indexed(more=".."), rf"{INDEX_FILE} places more in '\.\.'; shards must lie beside it"),
        (indexed(more="/etc/passwd"), rf"{INDEX_FILE} places more in '/etc/passwd'; shards must lie beside it"),
        (indexed(more=f"./{FIRST}"), rf"{INDEX_FILE} places more in './{FIRST}'; shards must lie beside it"),
        (outside(link=False), rf"{INDEX_FILE} places scale in '\.\./{SECOND}'; shards must lie beside it"),
        (outside(link=True), rf"{SECOND}, where {INDEX_FILE} places scale, is a link out of the directory"),
        (indexed(more=1), rf"{INDEX_FILE}: weight_map does not say for every tensor"),
        (lambda d: write_index(d, [FIRST]), rf"{INDEX_FILE}: weight_map does not say for every tensor"),
        (lambda d: (d / INDEX_FILE).write_text("{}"), rf"{INDEX_FILE}: weight_map does not say for every tensor"),
        (lambda d: (d / INDEX_FILE).write_text("[]"), rf"{INDEX_FILE} holds no JSON object"),
        (lambda d: (d / INDEX_FILE).write_text("{"), rf"{INDEX_FILE} is not JSON"),
        (
            lambda d: (d / INDEX_FILE).write_text('{"weight_map": {"scale": "a", "scale": "b"}}'),
            rf"{INDEX_FILE} is not JSON where it must be: scale is stated twice",
        ),
    ],
)
def test_indices_and_shards_that_disagree(change: Callable[[Path], None], message: str, sharded: Path) -> None:
    change(sharded)
    assert re.search(message, refusal(sharded))
