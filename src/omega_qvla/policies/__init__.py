"""Opening policies: the only room that knows lerobot and other model libraries."""

from __future__ import annotations

import json
from pathlib import Path

from omega_qvla.pack.checkpoint import is_checkpoint, read
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.lerobot_policy import LerobotPolicy
from omega_qvla.policies.pi0 import PI0
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policies.smolvla import SmolVLA
from omega_qvla.runtime.linear import Execution

_FAMILIES: dict[str, type[LerobotPolicy]] = {family.family: family for family in (PI05, PI0, SmolVLA)}


def open_policy(directory: Path) -> LerobotPolicy:
    """A floating-point policy from a lerobot checkpoint directory.

    Raises `CheckpointError` if there is none, if its type is not supported, or if it does not load strictly.
    """
    config = directory / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{directory} holds no lerobot checkpoint: config.json is missing")
    try:
        stated = json.loads(config.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{config} is not JSON: {error}") from error
    family = stated.get("type") if isinstance(stated, dict) else None
    if family not in _FAMILIES:
        raise CheckpointError(f"{config} is of a policy of type {family!r}; supported: {', '.join(_FAMILIES)}")
    return _FAMILIES[family].open(directory)


def load_policy(directory: Path, execution: Execution = "integer") -> LerobotPolicy:
    """A quantized policy from a checkpoint directory; needs neither the original nor calibration.

    `execution` holds for the linears whose scales an integer product can apply; the others are simulated.

    Raises `CheckpointError` if anything in the checkpoint is missing, damaged or foreign.
    """
    checkpoint = read(directory)
    if checkpoint.manifest.family not in _FAMILIES:
        raise CheckpointError(
            f"{directory} holds a policy of family {checkpoint.manifest.family!r}, which is unknown"
        )
    return _FAMILIES[checkpoint.manifest.family].load(checkpoint, execution)


def open_or_load(directory: Path, execution: Execution = "integer") -> LerobotPolicy:
    """A policy from either kind of directory."""
    return load_policy(directory, execution) if is_checkpoint(directory) else open_policy(directory)
