"""Writing and reading the checkpoint directory.

A checkpoint is written beside its destination and renamed when it is complete, tensor by tensor: what it is
made of need never be in memory at once. It is read only after sizes, hashes, names, shapes and dtypes of
everything in it have been compared with the manifest, and its tensors stay backed by the files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from omega_qvla.pack.expected import verify_tensors
from omega_qvla.pack.manifest import (
    CARD_FILE,
    KEPT_FILE,
    MANIFEST_FILE,
    POLICY_DIRECTORY,
    QUANTIZED_FILE,
    CheckpointError,
    FileRecord,
    Manifest,
    manifest_from_json,
    manifest_to_json,
)
from omega_qvla.pack.site import PackedSite, site_from, tensors_of
from omega_qvla.pack.stream import Tensors, TensorSource, opened, source_of, write_tensors


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_beside(destination: Path) -> Iterator[Path]:
    """A scratch directory beside `destination` that takes its place at the end, and vanishes on any error.

    Raises `CheckpointError` if the destination already exists: nothing is overwritten.
    """
    if destination.exists():
        raise CheckpointError(f"{destination} already exists; choose another directory or remove it")
    with scratch_beside(destination, "partial") as scratch:
        yield scratch
        os.rename(scratch, destination)


@contextmanager
def scratch_beside(destination: Path, purpose: str) -> Iterator[Path]:
    """An empty directory beside `destination`, on the same disk, that vanishes at the end if it is still there.

    What a killed run left under the same name is removed first.
    """
    scratch = destination.with_name(f".{destination.name}.{purpose}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save(
    destination: Path,
    manifest: Manifest,
    sites: Sequence[PackedSite],
    kept: Tensors,
    policy_files: Mapping[str, Path],
    declarations: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a checkpoint. `manifest.files` is filled in here; `policy_files` maps names below `policy/` to files,
    `declarations` names beside `manifest.json` to texts: what other programs look for there.

    Kept tensors that are given as sources are read one after the other, a piece at a time.

    Raises `CheckpointError` if the destination exists, a kept tensor contains NaN or infinity, or the sites are
    not what the manifest plans.
    """
    with written_beside(destination) as scratch:
        write_tensors(scratch / QUANTIZED_FILE, tensors_of(sites))
        with opened(scratch / QUANTIZED_FILE) as quantized:
            verify_tensors(manifest, quantized)
        write_tensors(scratch / KEPT_FILE, {name: _finite(name, tensor) for name, tensor in kept.items()})
        for name, path in policy_files.items():
            target = scratch / POLICY_DIRECTORY / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        for name, text in declarations.items():
            (scratch / name).write_text(text, encoding="utf-8")
        files = {
            str(path.relative_to(scratch)): FileRecord(path.stat().st_size, sha256(path))
            for path in sorted(scratch.rglob("*"))
            if path.is_file()
        }
        (scratch / MANIFEST_FILE).write_text(manifest_to_json(replace(manifest, files=files)))


def _finite(name: str, tensor: Tensor | TensorSource) -> TensorSource:
    """The same tensor, which cannot be read if it is not finite."""
    source = source_of(tensor)

    def pieces() -> Iterator[Tensor]:
        for piece in source.pieces():
            if piece.is_floating_point() and not piece.isfinite().all():
                raise CheckpointError(f"{name} contains NaN or infinity; the source checkpoint is damaged")
            yield piece

    return replace(source, read=pieces)


def is_checkpoint(directory: Path) -> bool:
    return (directory / MANIFEST_FILE).is_file()


def read_manifest(directory: Path) -> Manifest:
    """Raises `CheckpointError` if the directory holds no checkpoint of this program."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no quantized checkpoint: {MANIFEST_FILE} is missing")
    return manifest_from_json(path.read_text(errors="replace"))


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Its tensors are backed by its files: a page takes memory when it is touched, and what is
    written to a tensor is not written to its file. The files must stay as they are while tensors are in use."""

    directory: Path
    manifest: Manifest
    sites: list[PackedSite]
    kept: dict[str, Tensor]

    @property
    def policy_directory(self) -> Path:
        return self.directory / POLICY_DIRECTORY


def verify(directory: Path) -> Manifest:
    """The manifest of a checkpoint whose files and tensors are all as it says; no tensor is read.

    Raises `CheckpointError` if a file is missing, truncated, altered or not listed, or a tensor is missing,
    unknown, or of another shape or dtype than the plan says.
    """
    manifest = read_manifest(directory)
    _verify_files(directory, manifest)
    with opened(directory / QUANTIZED_FILE) as quantized, opened(directory / KEPT_FILE):
        verify_tensors(manifest, quantized)
    return manifest


def read(directory: Path) -> Checkpoint:
    """Verify a checkpoint, then map it into memory. Raises `CheckpointError` as `verify` does, before that."""
    manifest = verify(directory)
    with opened(directory / QUANTIZED_FILE) as quantized, opened(directory / KEPT_FILE) as kept:
        tensors = {name: quantized.get_tensor(name) for name in quantized.keys()}  # noqa: SIM118 - it is not a mapping
        plan = manifest.plan
        sites = [
            site_from(tensors, site.name, site.part, site.in_features, plan.spec(site), site.linears)
            for site in plan.sites
        ]
        return Checkpoint(directory, manifest, sites, {name: kept.get_tensor(name) for name in kept.keys()})  # noqa: SIM118


def _verify_files(directory: Path, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != record.bytes:
            raise CheckpointError(f"{path} has {size} bytes instead of {record.bytes}: it is truncated or foreign")
        if sha256(path) != record.sha256:
            raise CheckpointError(f"{path} is damaged: its content does not match the manifest's hash")
    for required in (QUANTIZED_FILE, KEPT_FILE):
        if required not in manifest.files:
            raise CheckpointError(f"{directory / MANIFEST_FILE} does not list {required}")
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    if unknown := found - set(manifest.files) - {MANIFEST_FILE, CARD_FILE}:
        raise CheckpointError(f"{directory / min(unknown)} does not belong to the checkpoint")
