"""What a message may hold, and what an array may be."""

from __future__ import annotations

import io
import pickle
import tracemalloc

import msgpack
import numpy as np
import pytest
from openpi_client import msgpack_numpy

from omega_qvla.serving.limits import Limits
from omega_qvla.serving.refusal import Refusal
from omega_qvla.serving.wire import (
    array,
    described_by_groot,
    described_by_openpi,
    packed_for_groot,
    packed_for_openpi,
    unpack,
)

LIMITS = Limits()


@pytest.mark.parametrize("dtype", ["|u1", "<f4", "<f8"])
def test_arrays_survive_both_ways(dtype: str) -> None:
    sent = np.arange(24).astype(dtype).reshape(2, 3, 4)
    message = unpack(msgpack_numpy.packb({"x": sent}), LIMITS)
    described = described_by_openpi(message["x"])
    assert described is not None
    np.testing.assert_array_equal(array(described, (dtype,), (2, 3, 4), "x"), sent)
    np.testing.assert_array_equal(msgpack_numpy.unpackb(msgpack.packb(packed_for_openpi(sent))), sent)
    described = described_by_groot(unpack(msgpack.packb({"x": packed_for_groot(sent)}), LIMITS)["x"])
    assert described is not None
    np.testing.assert_array_equal(array(described, (dtype,), (2, 3, 4), "x"), sent)


def test_every_kind_of_field_is_read() -> None:
    message = {"text": "ä", "list": [1, -2, 3.5, None, True], "map": {b"key": b"bytes"}}
    assert unpack(msgpack.packb(message), LIMITS) == message


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (b"", "no msgpack"),
        (b"\xc1", "no msgpack"),
        (msgpack.packb({"a": 1})[:-1], "no msgpack"),
        (msgpack.packb({"a": 1}) + b"\x00", "follow the end"),
        (msgpack.packb([1]), "no map"),
        (b"\x82\xa1a\x01\xa1a\x02", "'a' twice"),
        (b"\x81\x01\x02", "a key that is no text"),
        (b"\x81\x90\x02", "too deep"),
        (msgpack.packb({"a": msgpack.ExtType(1, b"x")}), "extension type"),
        (msgpack.packb({"a": list(range(200))}), "more than 128 values"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "more than 128 values"),
        (b"\xdf\xff\xff\xff\xff", "more than 128 values"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "no msgpack"),
        (b"\x91" * 500, "too deep"),
        (b"\x81\xa1a\xa1\xff", "no msgpack"),
    ],
)
def test_what_is_no_message_is_refused_with_a_sentence(message: bytes, sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence):
        unpack(message, LIMITS)


def test_a_message_cannot_grow() -> None:
    """A million empty maps are a million bytes; nobody builds them."""
    message = b"\x81\xa1a\xdd" + (1_000_000).to_bytes(4, "big") + b"\x80" * 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(Refusal):
            unpack(message, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({b"dtype": "|O"}, "dtype '|O'; send uint8"),
        ({b"dtype": "<f4"}, "dtype '<f4'"),
        ({b"dtype": ["|u1"]}, "dtype a list"),
        ({b"dtype": "x" * 1000}, "…"),
        ({b"shape": [2, 2]}, r"shape \[2, 2\]; send \[2, 3\]"),
        ({b"shape": [2.0, 3]}, "no list of whole numbers"),
        ({b"shape": [2**62, 2**62]}, "send"),
        ({b"shape": None}, "no list"),
        ({b"data": b"x"}, "not as many bytes"),
        ({b"data": "text"}, "not as many bytes"),
    ],
)
def test_a_wrong_array_is_refused_by_name(changes: dict[bytes, object], sentence: str) -> None:
    described = described_by_openpi(packed_for_openpi(np.zeros((2, 3), np.uint8)) | changes)
    assert described is not None
    with pytest.raises(Refusal, match=r"^it is|^it has") as refused:
        array(described, ("|u1",), (2, 3), "it")
    assert refused.match(sentence.replace("|", r"\|"))


def _saved(values: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version=version, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        pickle.dumps({"a": 1}),
        _saved(np.zeros(3, np.uint8))[:20],
        _saved(np.zeros(3, np.uint8), (2, 0)),
        b"\x93NUMPY\x01\x00" + (200).to_bytes(2, "little") + b"(" * 200,
        b"\x93NUMPY\x01\x00" + (60_000).to_bytes(2, "little") + b" " * 60_000,
        _saved(np.asfortranarray(np.zeros((2, 3), np.uint8))),
        "text",
        None,
    ],
)
def test_a_damaged_file_is_refused(data: object) -> None:
    with pytest.raises(Refusal, match=r"numpy\.(save|asc)"):
        described_by_groot({"__ndarray_class__": True, "as_npy": data})


def test_no_object_is_unpickled() -> None:
    described = described_by_groot({"__ndarray_class__": True, "as_npy": _saved(np.array([{}], object))})
    assert described is not None
    with pytest.raises(Refusal, match="dtype"):
        array(described, ("|u1",), (1,), "it")
