"""A checkpoint's tensors on disk, each read when it is asked for.

Full-size policies do not fit into memory twice, so nothing is read before it is needed, and nothing stays mapped
afterwards unless it was asked for as a mapping. Headers are parsed here instead of by `safetensors.safe_open`, which
says neither where a tensor lies nor which one is at fault, and takes a key that is stated twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omega_qvla.pack.manifest import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit that safetensors itself has."""
_PIECE = 1 << 22
"""Bytes that are read and looked at together."""


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.file}: {self.key}"


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a checkpoint on disk, each read when it is asked for.

    Every method that takes a name raises `CheckpointError` if there is no tensor of that name.
    """

    source: Path
    """The file that says which tensors there are."""
    _entries: Mapping[str, _Entry]

    @classmethod
    def open(cls, directory: Path) -> StoredTensors:
        """From `model.safetensors`, or the shards that `model.safetensors.index.json` names. Only headers are read.

        Raises `CheckpointError` if files are missing, truncated or malformed, if index and shards disagree, or if a
        tensor is empty or not float32, float16 or bfloat16.
        """
        weights, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
        if weights.is_file() and index.is_file():
            raise CheckpointError(f"{directory} holds both {WEIGHTS_FILE} and {INDEX_FILE}; remove one of them")
        if index.is_file():
            return cls(index, _sharded(index))
        if weights.is_file():
            return cls(weights, _header(weights))
        raise CheckpointError(f"{weights} is missing, and so is {INDEX_FILE}")

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def where(self, name: str) -> str:
        """`FILE: KEY`, as it is called in the file; for messages."""
        return str(self._entry(name))

    def renamed(self, rename: Callable[[str], str]) -> StoredTensors:
        """The same tensors under other names. Raises `CheckpointError` if two would have the same."""
        entries: dict[str, _Entry] = {}
        for name, entry in self._entries.items():
            new = rename(name)
            if new in entries:
                raise CheckpointError(f"{entry} and {entries[new].key} both stand for {new}; remove one of them")
            entries[new] = entry
        return replace(self, _entries=entries)

    def with_copies(self, copies: Mapping[str, str]) -> StoredTensors:
        """With tied tensors: names that are absent stand for the tensors that they are copies of, if those are
        present."""
        tied = {name: self._entries[source] for name, source in copies.items() if source in self}
        return replace(self, _entries={**tied, **self._entries})

    def require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises `CheckpointError` unless these tensors, and no others, are there in these shapes."""
        if missing := sorted(set(expected) - set(self._entries)):
            raise CheckpointError(
                f"{self.source} lacks {missing[0]} and {len(missing) - 1} other tensors of the policy"
            )
        if unknown := sorted(set(self._entries) - set(expected)):
            entry = self._entries[unknown[0]]
            raise CheckpointError(
                f"{entry.file} holds {entry.key} and {len(unknown) - 1} other tensors unknown to the policy"
            )
        for name, shape in expected.items():
            if (found := self.shape(name)) != tuple(shape):
                raise CheckpointError(f"{self.where(name)} has shape {list(found)} instead of {list(shape)}")

    def read(self, name: str) -> Tensor:
        """A tensor in memory, in the dtype in which it is stored; its file is closed again.

        Raises `CheckpointError` if it contains NaN or infinity.
        """
        entry = self._entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        _read(entry, tensor.flatten().view(torch.uint8).split(_PIECE))
        return tensor

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor's values in their order, flat and a few megabytes at a time. Raises as `read` does."""
        entry = self._entry(name)
        for start in range(0, entry.bytes, _PIECE):
            piece = torch.empty(min(_PIECE, entry.bytes - start), dtype=torch.uint8)
            _read(entry, [piece], start)
            yield piece.view(entry.dtype)

    def mapped(self, name: str) -> Tensor:
        """A tensor backed by its file, whose pages are read when they are touched; its values are not checked.

        Writing to it changes the memory, not the file. The mapping is closed with the last reference to it.
        """
        entry = self._entry(name)
        pages = np.memmap(entry.file, np.uint8, mode="c", offset=entry.start, shape=(entry.bytes,))
        return torch.from_numpy(pages).view(entry.dtype).view(entry.shape)

    def check_finite(self) -> None:
        """Read every tensor once, in little memory. Raises `CheckpointError` if one contains NaN or infinity."""
        memory = torch.empty(_PIECE, dtype=torch.uint8)
        for entry in dict.fromkeys(self._entries.values()):
            starts = range(0, entry.bytes, _PIECE)
            _read(entry, (memory[: min(_PIECE, entry.bytes - start)] for start in starts))

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.source} lacks {name}")
        return self._entries[name]


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `CheckpointError` if it holds none, or a key twice."""
    return _json_object(path.read_bytes(), path)


def _read(entry: _Entry, pieces: Iterable[Tensor], first: int = 0) -> None:
    """Read a tensor's bytes, from the `first` on, into consecutive pieces of memory, uint8.

    Without a mapping: its pages would count as resident until it is closed.
    """
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start + first)
        for piece in pieces:
            _fill(entry, file, piece)


def _fill(entry: _Entry, file: RawIOBase, memory: Tensor) -> None:
    """Read the file's next bytes, and look at the values that they are."""
    if file.readinto(memory.numpy()) != len(memory):
        raise CheckpointError(f"{entry} could not be read to its end: the file changed meanwhile")
    if not torch.stack(memory.view(entry.dtype).aminmax()).isfinite().all():  # NaN is both the least and the greatest
        raise CheckpointError(f"{entry} contains NaN or infinity")


def _sharded(index: Path) -> dict[str, _Entry]:
    """The tensors of all shards, which are exactly those of the index."""
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{index}: weight_map does not say for every tensor which file it is in")
    key_in = {shard: key for key, shard in shard_of.items()}
    entries: dict[str, _Entry] = {}
    for shard, key in key_in.items():
        entries |= _shard(index, shard, key, shard_of)
    return entries


def _shard(index: Path, shard: str, key: str, shard_of: Mapping[str, str]) -> dict[str, _Entry]:
    """The tensors of the shard that is named for `key`, among others."""
    path = index.parent / shard
    if shard in ("", "..") or Path(shard).name != shard:
        raise CheckpointError(f"{index} places {key} in {shard!r}; shards must lie beside it, under plain names")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, where {index.name} places {key}")
    if not _lies_beside(path.resolve(), index.parent.resolve()):
        raise CheckpointError(
            f"{path}, where {index.name} places {key}, is a link out of the directory; copy the file"
        )
    entries = _header(path)
    for found in entries:
        if shard_of.get(found) != shard:
            place = f"in {shard_of[found]}" if found in shard_of else "nowhere"
            raise CheckpointError(f"{path} holds {found}, which {index.name} places {place}")
    for wanted, place in shard_of.items():
        if place == shard and wanted not in entries:
            raise CheckpointError(f"{path} lacks {wanted}, which {index.name} places there")
    return entries


def _lies_beside(file: Path, directory: Path) -> bool:
    """Whether a file lies in a directory, or where the hub's cache keeps the files of that directory."""
    cached = directory.parent.name == "snapshots" and file.parent == directory.parents[1] / "blobs"
    return file.parent == directory or cached


def _header(path: Path) -> dict[str, _Entry]:
    """The tensors of one safetensors file, of which every byte belongs to exactly one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{path} is truncated or no safetensors file: its header is not complete")
        stated = _json_object(file.read(length), path)
    stated.pop("__metadata__", None)
    spans = {key: _span(path, key, value) for key, value in stated.items()}
    entries, first, end = {}, 8 + length, 0
    for key, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if first + stop > size:
            raise CheckpointError(f"{path} is truncated or no safetensors file: it ends before {key} does")
        if start != end:
            raise CheckpointError(f"{path}: {key} overlaps another tensor or lies behind a gap")
        entries[key], end = _entry(path, key, stated[key], first + start, stop - start), stop
    if first + end != size:
        raise CheckpointError(f"{path} has {size - first - end} bytes that belong to no tensor")
    return entries


def _span(path: Path, key: str, stated: Any) -> tuple[int, int]:
    """The first byte of a tensor and the one after its last, counted from the header's end."""
    match stated:
        case {"dtype": str(), "shape": list(), "data_offsets": [int(start), int(stop)]} if 0 <= start <= stop:
            return start, stop
    raise CheckpointError(f"{path}: {key} is not described by a dtype, a shape and data_offsets")


def _entry(path: Path, key: str, stated: dict[str, Any], start: int, length: int) -> _Entry:
    name, shape = stated["dtype"], stated["shape"]
    if name not in _DTYPES:
        raise CheckpointError(f"{path}: {key} is of dtype {name}; supported: {', '.join(_DTYPES)}")
    entry = _Entry(path, key, _DTYPES[name], tuple(shape), start)
    if not all(type(extent) is int and 0 < extent <= length for extent in shape) or entry.bytes != length:
        raise CheckpointError(f"{path}: {key} has {length} bytes, which do not hold {name} of shape {shape}")
    return entry


def _json_object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON where it must be: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object where it must")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is stated twice")
        found[key] = value
    return found
