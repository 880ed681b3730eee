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
from omega_qvla.pack.rows import packed_bytes
from omega_qvla.pack.site import PackedSite, site_from, tensors_of
from omega_qvla.spec import LinearSpec

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
        save_file(tensors_of(sites), scratch / QUANTIZED_FILE)
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
        tensors = {name: quantized.get_tensor(name) for name in quantized.keys()}  # noqa: SIM118 - it is not a mapping
        plan = manifest.plan
        sites = [
            site_from(tensors, site.name, site.part, site.in_features, plan.spec(site), site.linears)
            for site in plan.sites
        ]
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


Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors by name."""


def _expected(manifest: Manifest, file: safe_open) -> Expected:
    """Every tensor that the plan asks for; biases are as in the source.

    How long packed rows of mixed widths are is told by the widths in the file.
    """
    sizes = {linear.name: linear for linear in manifest.plan.linears}
    expected: Expected = {}
    for site in manifest.plan.sites:
        expected |= _expected_of_site(manifest, site)
        for name in site.linears:
            if name not in sizes:
                raise CheckpointError(f"{MANIFEST_FILE}: {name} of {site.name} is not in the plan")
            spec, out = manifest.plan.spec(site), sizes[name].out_features
            expected |= _expected_of_linear(name, out, site.in_features, spec)
            if f"{name}.widths" in expected:
                expected[f"{name}.weight_packed"] = (torch.uint8, (_mixed_bytes(file, name, site.in_features),))
    return expected


def _expected_of_site(manifest: Manifest, site: PlannedSite) -> Expected:
    spec, width = manifest.plan.spec(site), site.in_features
    transform, block = spec.transform, spec.transform.block_size
    steps = manifest.denoising_steps if spec.activation.mode == "per_step" else 1
    columns = width if spec.activation.granularity == "channel" else 1
    rotation = (torch.bfloat16, (width // block, block, block))
    tensors = {
        "smoothing": (torch.float32, (width,), transform.smoothing is not None),
        "first_rotation": (*rotation, "svd" in transform.first_rotation),
        "permutation": (torch.int32, (width,), transform.permutation != "none"),
        "rotation": (*rotation, "svd" in transform.rotation),
        "folded": (torch.float32, (width,), transform.folded_percentile is not None),
        "step_scale": (torch.float32, (steps, columns), spec.activation.calibrated),
    }
    return {f"{site.name}.{key}": (dtype, shape) for key, (dtype, shape, present) in tensors.items() if present}


def _expected_of_linear(name: str, out: int, width: int, spec: LinearSpec) -> Expected:
    weight, block = spec.weight, min(spec.transform.block_size, out)
    tensors = {
        "weight_packed": (torch.uint8, (out, width * weight.bits // 8), not weight.mixed),
        "weight_scale": (torch.bfloat16, (out, width // (weight.group_size or width)), True),
        "widths": (torch.uint8, (out,), weight.mixed),
        "low_rank_down": (torch.bfloat16, (weight.rank, width), weight.rank > 0),
        "low_rank_up": (torch.bfloat16, (out, weight.rank), weight.rank > 0),
        "output_rotation": (torch.bfloat16, (out // block, block, block), spec.transform.output_rotation != "none"),
    }
    return {f"{name}.{key}": (dtype, shape) for key, (dtype, shape, present) in tensors.items() if present}


def _mixed_bytes(file: safe_open, name: str, in_features: int) -> int:
    if f"{name}.widths" not in file.keys():  # noqa: SIM118 - it is not a mapping
        raise CheckpointError(f"{QUANTIZED_FILE} lacks {name}.widths")
    try:
        return packed_bytes(file.get_tensor(f"{name}.widths"), in_features)
    except ValueError as error:
        raise CheckpointError(f"{name}.widths: {error}") from error


_DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}


def _verify_tensors(manifest: Manifest, file: safe_open) -> None:
    expected, present = _expected(manifest, file), set(file.keys())
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
