"""Opening policies: the only room that knows lerobot and other model libraries.

The libraries are imported when a policy of theirs is opened: who brings a module of their own needs none of them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from omega_qvla.pack.checkpoint import is_checkpoint, read
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.layouts import Layout, recognized
from omega_qvla.runtime.linear import Execution

if TYPE_CHECKING:
    from omega_qvla.policies.base import AdaptedPolicy


@cache
def families() -> dict[str, type[AdaptedPolicy]]:
    """The adapters by the family's name."""
    from omega_qvla.policies.groot_n15.policy import GrootN15Policy
    from omega_qvla.policies.groot_n17 import GrootN17
    from omega_qvla.policies.pi0 import PI0
    from omega_qvla.policies.pi05 import PI05
    from omega_qvla.policies.smolvla import SmolVLA

    return {family.family: family for family in (PI05, PI0, SmolVLA, GrootN15Policy, GrootN17)}


def open_policy(directory: Path, *, streamed: bool = False) -> AdaptedPolicy:
    """A floating-point policy from a checkpoint directory in the layout of lerobot, openpi or NVIDIA.

    `streamed`: leave the weights of its blocks on disk until they are called.

    Raises `CheckpointError` if there is none, if its family is not supported, or if it does not load strictly.
    """
    layout, family = _recognized(directory)
    policy = family.open(layout.support, layout.tensors(), streamed=streamed)
    policy.layout = layout  # which holds a translation for as long as the policy lives
    return policy


def outline_policy(directory: Path) -> AdaptedPolicy:
    """The layers of such a checkpoint without their values, in seconds. Raises as `open_policy` does."""
    layout, family = _recognized(directory)
    policy = family.outline(layout.support, layout.tensors())
    policy.layout = layout
    return policy


def _recognized(directory: Path) -> tuple[Layout, type[AdaptedPolicy]]:
    if is_checkpoint(directory):
        raise CheckpointError(f"{directory} is quantized already; give the checkpoint that it was made from")
    layout = recognized(directory)
    if layout.family not in families():
        raise CheckpointError(
            f"{directory / 'config.json'} is of a policy of type {layout.family!r}; supported: "
            f"{', '.join(families())}"
        )
    return layout, families()[layout.family]


def load_policy(directory: Path, execution: Execution = "integer") -> AdaptedPolicy:
    """A quantized policy from a checkpoint directory; needs neither the original nor calibration.

    `execution` holds for the linears whose scales an integer product can apply; the others are simulated.

    Raises `CheckpointError` if anything in the checkpoint is missing, damaged or foreign.
    """
    checkpoint = read(directory)
    family = checkpoint.manifest.family
    if family not in families():
        raise CheckpointError(
            f"{directory} holds a policy of family {family!r}; this program opens {', '.join(families())} by itself, "
            "others with `load_into`"
        )
    return families()[family].load(checkpoint, execution)


def open_or_load(directory: Path, execution: Execution = "integer") -> AdaptedPolicy:
    """A policy from either kind of directory."""
    return load_policy(directory, execution) if is_checkpoint(directory) else open_policy(directory)
