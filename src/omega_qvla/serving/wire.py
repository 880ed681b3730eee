"""Messages in msgpack, read so that no client decides how much memory they take.

msgpack alone would build whatever a message describes, and a byte can stand for an empty map of 64. So containers are
opened here one by one and counted; an array is described first and becomes one only when it is what was expected.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from omega_qvla.serving.limits import Limits
from omega_qvla.serving.refusal import Refusal

_EXTENSIONS = frozenset({*range(0xC7, 0xCA), *range(0xD4, 0xD9)})
FLOATS = ("<f4", "<f8")
"""The dtypes in which clients send states and actions."""
_NPY_HEADER = 1024
"""Bytes; those of plain arrays have 118."""


@dataclass(frozen=True)
class DescribedArray:
    """What a message says of an array, and the bytes of its elements; nothing of it is checked."""

    dtype: object
    shape: object
    data: object


def unpack(message: bytes, limits: Limits) -> dict[Any, Any]:
    """The fields of a message, which are maps, lists, texts, bytes and numbers.

    Raises `Refusal` if it is no map, or holds more or deeper than the limits allow.
    """
    try:
        fields = _Reader(message, limits.fields).whole(limits.depth)
    except (msgpack.exceptions.UnpackException, ValueError, IndexError) as error:
        raise Refusal("message", "the message is no msgpack, or is cut off; send one msgpack map") from error
    if not isinstance(fields, dict):
        raise Refusal("message", "the message is no map; send one msgpack map of fields")
    return fields


def pack(answer: Any) -> bytes:
    return msgpack.packb(answer)


class _Reader:
    def __init__(self, message: bytes, fields: int) -> None:
        self._message, self._left, self._fields = message, fields, fields
        self._unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(message)))
        self._unpacker.feed(message)

    def whole(self, depth: int) -> Any:
        value = self._value(depth)
        if self._unpacker.tell() != len(self._message):
            raise Refusal("message", "bytes follow the end of the message; send one msgpack map")
        return value

    def _value(self, depth: int) -> Any:
        self._count(1)
        kind = self._message[self._unpacker.tell()]
        is_map = 0x80 <= kind <= 0x8F or kind in (0xDE, 0xDF)
        if not is_map and not 0x90 <= kind <= 0x9F and kind not in (0xDC, 0xDD):
            if kind in _EXTENSIONS:
                raise Refusal(
                    "message", "the message has an extension type of msgpack; send maps, lists and plain values"
                )
            return self._unpacker.unpack()
        if depth == 0:
            raise Refusal("message", "the message has maps or lists too deep in each other; send one map of fields")
        if not is_map:
            return [self._value(depth - 1) for _ in range(self._counted(self._unpacker.read_array_header()))]
        return self._map(self._counted(self._unpacker.read_map_header()), depth - 1)

    def _map(self, length: int, depth: int) -> dict[str | bytes, Any]:
        entries: dict[str | bytes, Any] = {}
        for _ in range(length):
            key = self._value(0)
            if not isinstance(key, str | bytes):
                raise Refusal("message", "the message has a key that is no text; name every field by a text")
            if key in entries:
                raise Refusal("message", f"the message has the field {shown(key)} twice; send each once")
            entries[key] = self._value(depth)
        return entries

    def _counted(self, length: int) -> int:
        """A length as the message states it; each of its elements needs a field of its own."""
        if length > self._left:
            self._count(length)
        return length

    def _count(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise Refusal("size", f"the message has more than {self._fields} values; send only what the policy takes")


def shown(name: object) -> str:
    """What a client wrote, for a sentence: quoted, without control characters, and not long."""
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    if not isinstance(text, str):
        return f"a {type(text).__name__}"
    return repr(text if len(text) <= 60 else text[:60] + "…")


def described_by_openpi(value: object) -> DescribedArray | None:
    """The array that a map of openpi's clients describes; None if it is no such map."""
    if not isinstance(value, dict) or value.get(b"__ndarray__") is not True:
        return None
    return DescribedArray(value.get(b"dtype"), value.get(b"shape"), value.get(b"data"))


def packed_for_openpi(array: np.ndarray) -> dict[bytes, Any]:
    """As `openpi_client.msgpack_numpy` reads it."""
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def described_by_groot(value: object) -> DescribedArray | None:
    """The array that a map of GR00T's clients holds as the bytes of `np.save`; None if it is no such map.

    Only its header is read. Raises `Refusal` if there is none.
    """
    if not isinstance(value, dict) or "__ndarray_class__" not in value:
        return None
    data = value.get("as_npy")
    if not isinstance(data, bytes):
        raise Refusal("array", "an array has no bytes under 'as_npy'; send those that numpy.save writes")
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        read: Any = np.lib.format.read_array_header_1_0  # whose types lack the limit
        shape, by_columns, dtype = read(file, max_header_size=_NPY_HEADER)
    except Exception as error:  # numpy evaluates the header as a literal, which fails in many ways
        raise Refusal("array", "the header of an array is damaged; send the bytes that numpy.save writes") from error
    if by_columns and len(shape) > 1:
        raise Refusal("array", "an array lies column by column; send numpy.ascontiguousarray of it")
    return DescribedArray(dtype.str, shape, memoryview(data)[file.tell() :])


def packed_for_groot(array: np.ndarray) -> dict[str, Any]:
    """As GR00T's clients read it."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def array(described: DescribedArray, dtypes: tuple[str, ...], shape: tuple[int, ...], name: str) -> np.ndarray:
    """The array, a copy, if it has one of the dtypes and the shape; raises `Refusal` that names it if not."""
    if described.dtype not in dtypes:
        expected = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise Refusal("array", f"{name} is of dtype {shown(described.dtype)}; send {expected}")
    stated = described.shape
    if not isinstance(stated, list | tuple) or tuple(stated) != shape or any(type(n) is not int for n in stated):
        raise Refusal("array", f"{name} has shape {_short(stated)}; send {list(shape)}")
    dtype = np.dtype(str(described.dtype))
    data = described.data
    if not isinstance(data, bytes | memoryview) or len(data) != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise Refusal("array", f"{name} has not as many bytes as its shape and dtype say; send all of them")
    return np.frombuffer(data, dtype).reshape(shape).copy()  # torch wants what may be written


def _short(shape: object) -> str:
    if not isinstance(shape, list | tuple) or len(shape) > 8 or any(type(n) is not int for n in shape):
        return "that is no list of whole numbers"
    return str(list(shape))
