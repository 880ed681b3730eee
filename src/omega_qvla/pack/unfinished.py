"""What an interrupted quantization has finished, kept beside its destination until it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FINGERPRINT = "fingerprint"


class Unfinished:
    """Named groups of tensors, each with a fingerprint of everything that it was made from.

    A group whose fingerprint is another than the one asked for is not there: what changed is made again.
    """

    def __init__(self, destination: Path, origin: dict[str, Any]) -> None:
        """`origin`: JSON that identifies what every group is made from, such as the source's hashes."""
        self.directory = destination.with_name(f".{destination.name}.unfinished")
        self._origin = origin

    def get(self, name: str, made_from: Any) -> dict[str, Tensor] | None:
        """The tensors of a group, or None if it is not finished, or is not readable."""
        try:
            with safe_open(self._path(name), "pt") as file:
                if (file.metadata() or {}).get(_FINGERPRINT) != self._fingerprint(made_from):
                    return None
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a mapping
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, name: str, made_from: Any, tensors: dict[str, Tensor]) -> None:
        """Keep a group. `made_from`: JSON of what it is made from besides the origin."""
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self._path(name).with_suffix(".partial")
        save_file(tensors, partial, {_FINGERPRINT: self._fingerprint(made_from)})
        os.replace(partial, self._path(name))

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _fingerprint(self, made_from: Any) -> str:
        text = json.dumps([self._origin, made_from], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
