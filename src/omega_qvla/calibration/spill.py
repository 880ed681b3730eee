"""The tensors of paused inferences: how much memory they take, and how they lie on disk meanwhile.

A paused inference holds its activations in the local variables of the model's functions. They are found there, and
their storages emptied and filled again: whoever refers to a tensor refers to the same one before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ctypes import c_char
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from greenlet import greenlet
from torch import Tensor, UntypedStorage, nn

_SMALLEST = 2**16
"""Bytes of a storage below which a file is not worth it."""
_DEPTH = 5
"""How deep tensors lie in what a local variable refers to: a cache of keys and values has layers of tensors."""


class Keeper(Protocol):
    """Who is told when an inference pauses, and before it goes on."""

    def after_pausing(self, inference: greenlet) -> None: ...

    def before_going_on(self, inference: greenlet) -> None: ...


class Scale:
    """Weighs the activations of paused inferences."""

    def __init__(self, module: nn.Module) -> None:
        """`module`: whose parameters and buffers are nobody's activations."""
        self._shared = {_address(x) for x in (*module.parameters(), *module.buffers()) if x.device.type != "meta"}
        self.most = 0
        """Bytes of the inference that held most."""

    def after_pausing(self, inference: greenlet) -> None:
        self.most = max(self.most, sum(storage.nbytes() for storage in self._storages(inference)))

    def before_going_on(self, inference: greenlet) -> None:
        pass

    def _storages(self, inference: greenlet) -> list[UntypedStorage]:
        """The large storages in memory that are activations of this inference."""
        found: dict[int, UntypedStorage] = {}
        for tensor in _tensors(inference):
            storage, address = tensor.untyped_storage(), _address(tensor)
            own = address not in self._shared and storage.resizable()
            if own and tensor.device.type == "cpu" and storage.nbytes() >= _SMALLEST:
                found[address] = storage
        return list(found.values())


class Spill(Scale):
    """Keeps the activations of paused inferences within an allowance."""

    def __init__(self, directory: Path, allowance: int, module: nn.Module) -> None:
        """`directory`: an existing one, for one file per inference. `allowance`: bytes of all paused inferences
        that may stay in memory. `module`: as `Scale` has it."""
        super().__init__(module)
        self._directory, self._allowance = directory, allowance
        self._resident: dict[greenlet, int] = {}
        self._away: dict[greenlet, list[tuple[UntypedStorage, int]]] = {}
        self.written = 0
        """Bytes written so far."""

    def after_pausing(self, inference: greenlet) -> None:
        """Write what a paused inference holds to disk, unless it still fits into the allowance."""
        storages = self._storages(inference)
        size = sum(storage.nbytes() for storage in storages)
        if sum(self._resident.values()) + size <= self._allowance:
            self._resident[inference] = size
            return
        with self._path(inference).open("wb") as file:
            for storage in storages:
                file.write(_bytes(storage))
        self._away[inference] = [(storage, storage.nbytes()) for storage in storages]
        self.written += size
        for storage in storages:
            storage.resize_(0)

    def before_going_on(self, inference: greenlet) -> None:
        """Read back what was written; nothing if nothing was."""
        self._resident.pop(inference, None)
        away = self._away.pop(inference, None)
        if away is None:
            return
        with self._path(inference).open("rb") as file:
            for storage, size in away:
                storage.resize_(size)
                file.readinto(_bytes(storage))
        self._path(inference).unlink()

    def _path(self, inference: greenlet) -> Path:
        return self._directory / f"activations-{id(inference)}"


def _tensors(inference: greenlet) -> Iterator[Tensor]:
    """All tensors in the local variables of the model's code in a paused inference.

    Our own functions are left out: what they refer to, such as the statistics, belongs to all inferences.
    """
    frame: FrameType | None = inference.gr_frame
    seen: set[int] = set()
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("omega_qvla."):
            yield from _within(frame.f_locals.values(), _DEPTH, seen)
        frame = frame.f_back


def _within(values: Iterable[Any], depth: int, seen: set[int]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth and id(value) not in seen and not isinstance(value, nn.Module | type):
            seen.add(id(value))
            yield from _within(_parts(value), depth - 1, seen)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple):
        return value
    return list(getattr(value, "__dict__", {}).values())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(storage: UntypedStorage) -> memoryview:
    """The memory of a storage. As a numpy array it could never be resized again."""
    return memoryview((c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
