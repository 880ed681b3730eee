"""Which files of a checkpoint travel, and what else may stand in its repository."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from omega_qvla.pack.manifest import CARD_FILE, MANIFEST_FILE, Manifest

SAFE_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".model")
"""Tensors, JSON, vocabularies and their merges, chat templates, SentencePiece: data that no reader executes. Chat
templates are rendered in a sandbox by the libraries that read them."""
HUB_FILES = (".gitattributes",)
"""What the Hub itself puts into a repository; it stays there."""
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)


class HubError(RuntimeError):
    """A repository that cannot be read or written as it is; the message names what is wrong and the way out."""


def travelling(manifest: Manifest) -> list[str]:
    """The names of a checkpoint's files, its manifest first.

    Raises `HubError` for a name that leads out of the directory or is not plain, or a file that is not data.
    """
    for name in manifest.files:
        if not _NAME.fullmatch(name) or ".." in PurePosixPath(name).parts or name in (MANIFEST_FILE, CARD_FILE):
            raise HubError(f"the manifest names the file {name!r}, which is no plain name inside a checkpoint")
        if PurePosixPath(name).suffix not in SAFE_SUFFIXES:
            raise HubError(f"the manifest names the file {name!r}; on the Hub are {' '.join(SAFE_SUFFIXES)} only")
    return [MANIFEST_FILE, *sorted(manifest.files)]


def check_listing(repository: str, found: Mapping[str, int | None], manifest: Manifest) -> None:
    """Whether a repository holds just this checkpoint; `found`: bytes of its files by name, where they are known.

    Raises `HubError` naming a file that is missing, foreign or of another size.
    """
    if missing := [name for name in travelling(manifest) if name not in found]:
        raise HubError(f"{repository} lacks {missing[0]}, which its manifest names; it was not pushed whole")
    if unknown := foreign(found, manifest):
        raise HubError(f"{repository} holds {unknown[0]}, which its manifest does not name; nothing was downloaded")
    for name, record in manifest.files.items():
        if found[name] not in (None, record.bytes):
            raise HubError(f"{repository}: {name} has {found[name]} bytes instead of {record.bytes}")


def foreign(found: Collection[str], manifest: Manifest) -> list[str]:
    """The files of a repository that are neither the checkpoint's, nor its card, nor the Hub's own."""
    return sorted(set(found) - set(travelling(manifest)) - {CARD_FILE, *HUB_FILES})
