"""Settings of a JSON file, all of them understood."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from omega_qvla.pack.manifest import CheckpointError


def read_strictly[T](directory: Path, file: str, kind: type[T], passed_over: Mapping[str, Set[str]]) -> T:
    """The content of a JSON file in a checkpoint directory, as the pydantic dataclass `kind`.

    `passed_over` names settings that are not looked at, by the key of the object that holds them, or by `file`.

    Raises `CheckpointError` if the file is missing, if it is no JSON object, or if a setting is missing, unknown or
    not supported.
    """
    path = directory / file
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} holds no GR00T checkpoint: {file} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object; restore the file that came with the checkpoint")
    return validated(kind, _relevant(data, file, passed_over), str(path))


def validated[T](kind: type[T], data: dict[str, Any], where: str) -> T:
    """What JSON has given, as the pydantic dataclass `kind`. Raises `CheckpointError` that names `where`."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data))
    except ValidationError as error:
        raise CheckpointError(f"{where}: {_reason(error)}") from error


def _relevant(data: dict[str, Any], section: str, passed_over: Mapping[str, Set[str]]) -> dict[str, Any]:
    without = passed_over.get(section, frozenset())
    return {
        key: _relevant(value, key, passed_over) if isinstance(value, dict) else value
        for key, value in data.items()
        if key not in without
    }


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case "missing":
            return f"{place} is missing; copy it from the checkpoint that this one was trained from"
        case "unexpected_keyword_argument":
            return f"{place} is unknown; remove it if it does not matter for inference"
        case "value_error":
            return f"{place}: {first['ctx']['error']}" if place else str(first["ctx"]["error"])
        case _:
            expected = first["msg"].removeprefix("Input ")
            return f"{place} is {first['input']!r}, which is not supported: it {expected}, as in the released model"
