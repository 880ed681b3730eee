"""Writing and reading the checkpoint directory.

A checkpoint is written beside its destination and renamed when it is complete. It is read only after sizes,
hashes, names, shapes and dtypes of everything in it have been compared with the manifest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omega_qvla.pack.manifest import (
    CheckpointError,
    FileRecord,
    Manifest,
    PlannedSite,
    manifest_from_json,
    manifest_to_json,
)
from omega_qvla.pack.site import SITE_TENSORS, PackedLinear, PackedSite

MANIFEST_FILE = "manifest.json"
QUANTIZED_FILE = "quantized.safetensors"
KEPT_FILE = "kept.safetensors"
POLICY_DIRECTORY = "policy"
"""Configuration, processors and tokenizer of the policy, as its own library wrote them."""


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
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        os.rename(scratch, destination)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def save(
    destination: Path,
    manifest: Manifest,
    sites: list[PackedSite],
    kept: Mapping[str, Tensor],
    policy_files: Mapping[str, Path],
) -> None:
    """Write a checkpoint. `manifest.files` is filled in here; `policy_files` maps names below `policy/` to files.

    Raises `CheckpointError` if the destination exists or a kept tensor contains NaN or infinity.
    """
    for name, tensor in kept.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{name} contains NaN or infinity; the source checkpoint is damaged")
    with written_beside(destination) as scratch:
        save_file({k: v.contiguous() for k, v in _tensors(sites).items()}, scratch / QUANTIZED_FILE)
        save_file({k: v.detach().clone().contiguous() for k, v in kept.items()}, scratch / KEPT_FILE)
        for name, path in policy_files.items():
            target = scratch / POLICY_DIRECTORY / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        files = {
            str(path.relative_to(scratch)): FileRecord(path.stat().st_size, sha256(path))
            for path in sorted(scratch.rglob("*"))
            if path.is_file()
        }
        (scratch / MANIFEST_FILE).write_text(manifest_to_json(replace(manifest, files=files)))


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
    """A verified checkpoint, fully read."""

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
    with _opened(directory / QUANTIZED_FILE) as quantized, _opened(directory / KEPT_FILE):
        _verify_tensors(manifest, quantized)
    return manifest


def read(directory: Path) -> Checkpoint:
    """Verify a checkpoint, then read it. Raises `CheckpointError` as `verify` does, before anything is allocated."""
    manifest = verify(directory)
    with _opened(directory / QUANTIZED_FILE) as quantized, _opened(directory / KEPT_FILE) as kept:
        sites = [_read_site(manifest, site, quantized) for site in manifest.plan.sites]
        return Checkpoint(directory, manifest, sites, {name: kept.get_tensor(name) for name in kept.keys()})  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


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
    if unknown := found - set(manifest.files) - {MANIFEST_FILE}:
        raise CheckpointError(f"{directory / min(unknown)} does not belong to the checkpoint")


def _tensors(sites: list[PackedSite]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site in sites:
        tensors |= {f"{site.name}.{key}": value for key, value in site.tensors.items()}
        for linear in site.linears:
            tensors[f"{linear.name}.weight_packed"] = linear.packed
            tensors[f"{linear.name}.weight_scale"] = linear.scale
            if linear.bias is not None:
                tensors[f"{linear.name}.bias"] = linear.bias
    return tensors


def _expected(manifest: Manifest) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor that the plan asks for, by name; biases are as in the source."""
    sizes = {linear.name: linear for linear in manifest.plan.linears}
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for site in manifest.plan.sites:
        spec, width = manifest.plan.spec(site), site.in_features
        transform, block = spec.transform, spec.transform.block_size
        steps = manifest.denoising_steps if spec.activation.mode == "per_step" else 1
        columns = width if spec.activation.granularity == "channel" else 1
        tensors = {
            "permutation": (torch.int32, (width,), transform.permutation != "none"),
            "rotation": (torch.bfloat16, (width // block, block, block), "svd" in transform.rotation),
            "smoothing": (torch.float32, (width,), transform.smoothing is not None),
            "folded": (torch.float32, (width,), transform.folded_percentile is not None),
            "step_scale": (torch.float32, (steps, columns), spec.activation.mode != "dynamic"),
        }
        expected |= {
            f"{site.name}.{key}": (dtype, shape) for key, (dtype, shape, present) in tensors.items() if present
        }
        groups = width // (spec.weight.group_size or width)
        for name in site.linears:
            if name not in sizes:
                raise CheckpointError(f"{MANIFEST_FILE}: {name} of {site.name} is not in the plan")
            out = sizes[name].out_features
            expected[f"{name}.weight_packed"] = (torch.uint8, (out, width * spec.weight.bits // 8))
            expected[f"{name}.weight_scale"] = (torch.bfloat16, (out, groups))
    return expected


_DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}


def _verify_tensors(manifest: Manifest, file: safe_open) -> None:
    expected, present = _expected(manifest), set(file.keys())
    quantized = [linear for linear in manifest.plan.linears if linear.site is not None]
    biases = {f"{linear.name}.bias": [linear.out_features] for linear in quantized}
    if missing := set(expected) - present:
        raise CheckpointError(f"{QUANTIZED_FILE} lacks {min(missing)}")
    if unknown := present - set(expected) - set(biases):
        raise CheckpointError(f"{QUANTIZED_FILE} holds {min(unknown)}, which the plan does not know")
    for name, (dtype, shape) in expected.items():
        tensor = file.get_slice(name)
        stored = tensor.get_dtype()
        found = _DTYPES.get(stored, stored), tuple(tensor.get_shape())
        if found != (dtype, shape):
            raise CheckpointError(f"{name} is {found[0]} {list(found[1])} instead of {dtype} {list(shape)}")
    for name in biases.keys() & present:
        if (size := file.get_slice(name).get_shape()) != biases[name]:
            raise CheckpointError(f"{name} has shape {size} instead of {biases[name]}")


def _read_site(manifest: Manifest, site: PlannedSite, file: safe_open) -> PackedSite:
    names = set(file.keys())
    tensors = {key: file.get_tensor(f"{site.name}.{key}") for key in SITE_TENSORS if f"{site.name}.{key}" in names}
    linears = tuple(
        PackedLinear(
            name,
            file.get_tensor(f"{name}.weight_packed"),
            file.get_tensor(f"{name}.weight_scale"),
            file.get_tensor(f"{name}.bias") if f"{name}.bias" in names else None,
        )
        for name in site.linears
    )
    return PackedSite(site.name, site.part, site.in_features, manifest.plan.spec(site), linears, tensors)
