"""The tensors of a quantized checkpoint that stayed in floating point, given to a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from omega_qvla.pack.manifest import CheckpointError


def assign(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give every parameter and buffer of `module` its value, in the module's dtype; nothing is copied that has it.

    Raises `CheckpointError` that names what does not fit; then nothing was given.
    """
    values = fitting(module.state_dict(), tensors, path)
    module.load_state_dict(values, strict=True, assign=True)


def fitting(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`tensors`, read from `path`, in the dtypes of those `expected`.

    Raises `CheckpointError` that names what is missing, unknown, of another shape or not finite.
    """
    if missing := sorted(set(expected) - set(tensors)):
        raise CheckpointError(f"{path} lacks {missing[0]} and {len(missing) - 1} other tensors of the policy")
    if unknown := sorted(set(tensors) - set(expected)):
        raise CheckpointError(f"{path} holds {unknown[0]} and {len(unknown) - 1} other tensors unknown to the policy")
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)} instead of {list(wanted.shape)}")
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise CheckpointError(f"{path}: {name} contains NaN or infinity")
    # A tensor under several names stays one, in whatever dtype.
    converted = {(id(x), expected[n].dtype): x.to(expected[n].dtype) for n, x in tensors.items()}
    return {name: converted[id(tensor), expected[name].dtype] for name, tensor in tensors.items()}


def _is_finite(tensor: Tensor) -> bool:
    """Without a copy: embeddings of a large vocabulary would more than double what loading takes."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())  # NaN is least and greatest
