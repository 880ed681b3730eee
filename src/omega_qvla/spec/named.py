"""TOML files that come with the package, by name, or lie elsewhere, by path."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any


def names_in(directory: Traversable) -> list[str]:
    """The TOML files of a directory, without their suffix."""
    return sorted(entry.name.removesuffix(".toml") for entry in directory.iterdir() if entry.name.endswith(".toml"))


def read_named[T](
    what: str,
    name_or_path: str | Path,
    directory: Traversable,
    from_dict: Callable[[dict[str, Any]], T],
    error: type[ValueError],
) -> T:
    """What `from_dict` makes of the file `name_or_path`, or of that name in `directory`; a `what`, in errors.

    Raises `error` if there is none, it is no TOML, or `from_dict` raises `error`; the message names the file.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise error(f"there is no {what} file {path}")
        text, origin = path.read_text(encoding="utf-8"), str(path)
    elif str(name_or_path) in (names := names_in(directory)):
        text, origin = (directory / f"{name_or_path}.toml").read_text(encoding="utf-8"), f"{what} {name_or_path}"
    else:
        raise error(f"there is no {what} {str(name_or_path)!r}; there are {', '.join(names)}")
    try:
        return from_dict(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, error) as found:
        raise error(f"{origin}: {found}") from found
