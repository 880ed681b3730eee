"""A safetensors file written tensor by tensor, each read when its turn comes.

`safetensors.torch.save_file` wants every tensor in memory at once. What is written here are the same bytes:
eight bytes of header length, the header as JSON padded with spaces to eight bytes, then the tensors back to
back, wide dtypes first and by name within a dtype, so that each is aligned (safetensors README, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omega_qvla.pack.manifest import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""By the name that safetensors gives it, every dtype that a checkpoint can hold, in the library's own order."""

PIECE_BYTES = 2**22
"""How much of a tensor is handled at a time."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is read when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Tensor]]
    """Its values in their order, in one tensor or cut into several, of any shape."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """Its values, flat, PIECE_BYTES at most at a time."""
        for part in self.read():
            yield from part.detach().reshape(-1).split(PIECE_BYTES // part.itemsize)


Tensors = Mapping[str, Tensor | TensorSource]
"""Tensors by name, in memory or to be read."""


def source_of(tensor: Tensor | TensorSource) -> TensorSource:
    """A tensor in memory as a source."""
    if isinstance(tensor, TensorSource):
        return tensor
    return TensorSource(tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def sources_in(path: Path) -> dict[str, TensorSource]:
    """The tensors of a safetensors file; only its header is read, and no part of it stays mapped.

    Raises `CheckpointError` if it is no safetensors file or holds a dtype that a checkpoint cannot hold.
    """
    with opened(path):  # the library checks that the header fits the file
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop(_METADATA, None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {entry['dtype']}; there are {', '.join(DTYPES)}")
        dtype, (start, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        read = partial(_read, path, dtype, 8 + length + start, end - start)
        found[name] = TensorSource(dtype, tuple(entry["shape"]), read)
    return found


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, a piece of a tensor at a time. The same tensors give the same bytes.

    Raises `CheckpointError` if a tensor has a dtype that a checkpoint cannot hold, or is read with another dtype
    or size than it was announced with.
    """
    sources = {name: source_of(tensor) for name, tensor in tensors.items()}
    for name, source in sources.items():
        if source.dtype not in _NAMES:
            raise CheckpointError(f"{name} has dtype {source.dtype}; a checkpoint holds {', '.join(DTYPES)}")
    names = sorted(sources, key=lambda name: (-_ORDER[sources[name].dtype], name))
    with path.open("wb") as file:
        file.write(_header({name: sources[name] for name in names}, metadata))
        for name in names:
            written = 0
            for piece in sources[name].pieces():
                if piece.dtype != sources[name].dtype:
                    raise CheckpointError(f"{name} is {piece.dtype}, announced as {sources[name].dtype}")
                written += file.write(piece.contiguous().view(torch.uint8).numpy())
            if written != sources[name].nbytes:
                raise CheckpointError(f"{name} has {written} bytes, announced with {sources[name].nbytes}")


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file. Its tensors are backed by the file: pages are read when they are touched, and what is
    written to such a tensor stays in memory.

    Raises `CheckpointError` if it is no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


def _header(sources: Mapping[str, TensorSource], metadata: Mapping[str, str] | None) -> bytes:
    """Length and header of a file in which the tensors stand in this order."""
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    start = 0
    for name, source in sources.items():
        end = start + source.nbytes
        entries[name] = {"dtype": _NAMES[source.dtype], "shape": source.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read(path: Path, dtype: torch.dtype, start: int, size: int) -> Iterator[Tensor]:
    with path.open("rb") as file:
        file.seek(start)
        while size:
            buffer = bytearray(min(size, PIECE_BYTES))
            if file.readinto(buffer) != len(buffer):
                raise CheckpointError(f"{path} became shorter while it was read; leave it alone and start again")
            yield torch.frombuffer(buffer, dtype=dtype)
            size -= len(buffer)
