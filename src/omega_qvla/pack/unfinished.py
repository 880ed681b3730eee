"""What an interrupted quantization has finished, kept beside its destination until it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.pack.stream import Tensors, opened, write_tensors

_FINGERPRINT = "fingerprint"
_ORIGIN_FILE = "origin.json"


class Unfinished:
    """Named groups of tensors, each with a fingerprint of everything that it was made from.

    A group whose fingerprint is another than the one asked for is not there: what changed is made again.
    """

    def __init__(self, destination: Path, origin: dict[str, Any]) -> None:
        """`origin`: JSON that identifies what every group is made from, such as the source's hashes.

        Raises `CheckpointError` if what lies there was made from something else: it is another run's.
        """
        self.directory = destination.with_name(f".{destination.name}.unfinished")
        self._origin = origin
        stated = self.directory / _ORIGIN_FILE
        if stated.is_file() and (found := json.loads(stated.read_text())) != origin:
            other = next(key for key in (*origin, *found) if found.get(key) != origin.get(key))
            raise CheckpointError(
                f"{self.directory} holds the finished blocks of a run with another {other}; remove it to start over, "
                "or choose another destination"
            )

    def get(self, name: str, made_from: Any) -> dict[str, Tensor] | None:
        """The tensors of a group, backed by its file, or None if it is not finished, or is not readable."""
        if not self._is_finished(name, made_from):
            return None
        with opened(self._path(name)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a mapping

    def put(self, name: str, made_from: Any, tensors: Tensors) -> None:
        """Keep a group. `made_from`: JSON of what it is made from besides the origin."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / _ORIGIN_FILE).exists():
            self._write_origin()
        partial = self._path(name).with_suffix(".partial")
        write_tensors(partial, tensors, {_FINGERPRINT: self._fingerprint(made_from)})
        os.replace(partial, self._path(name))

    def _write_origin(self) -> None:
        partial = self.directory / f"{_ORIGIN_FILE}.partial"
        partial.write_text(json.dumps(self._origin))
        os.replace(partial, self.directory / _ORIGIN_FILE)

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _is_finished(self, name: str, made_from: Any) -> bool:
        try:
            with opened(self._path(name)) as file:
                return (file.metadata() or {}).get(_FINGERPRINT) == self._fingerprint(made_from)
        except (FileNotFoundError, CheckpointError):
            return False

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _fingerprint(self, made_from: Any) -> str:
        text = json.dumps([self._origin, made_from], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
