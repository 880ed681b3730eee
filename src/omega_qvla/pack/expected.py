"""Which tensors a plan asks for, and whether a file holds exactly these."""

from __future__ import annotations

import torch
from safetensors import safe_open

from omega_qvla.pack.manifest import MANIFEST_FILE, QUANTIZED_FILE, CheckpointError, Manifest, PlannedSite
from omega_qvla.pack.rows import packed_bytes
from omega_qvla.pack.stream import DTYPES
from omega_qvla.spec import LinearSpec

Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors by name."""


def verify_tensors(manifest: Manifest, file: safe_open) -> None:
    """Compare the names, dtypes and shapes in QUANTIZED_FILE with the plan; of tensors, only widths are read.

    Raises `CheckpointError` if one is missing, unknown, or of another shape or dtype than the plan says.
    """
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
        found = DTYPES.get(stored, stored), tuple(tensor.get_shape())
        if found != (dtype, shape):
            raise CheckpointError(f"{name} is {found[0]} {list(found[1])} instead of {dtype} {list(shape)}")
    for name in biases.keys() & present:
        if (size := file.get_slice(name).get_shape()) != biases[name]:
            raise CheckpointError(f"{name} has shape {size} instead of {biases[name]}")


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
