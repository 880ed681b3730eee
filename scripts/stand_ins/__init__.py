"""Checkpoints of released sizes in released layouts, with random weights in place of the released ones.

Configuration, processors and a tokenizer of a few words are written as the family's own library has them, so that
nothing is needed from a hub; `weights` says what the values are.
"""

from pathlib import Path
from typing import Protocol

from omega_qvla.pack.checkpoint import written_beside
from stand_ins.lerobot_layout import LEROBOT, pi05_expert
from stand_ins.nvidia_layout import GrootN15StandIn, groot_n15_head
from stand_ins.weights import weights, write_weights

FAMILIES = (*LEROBOT, GrootN15StandIn.family)
ACTION_PARTS = {"pi05_expert": pi05_expert, "groot_n15_head": groot_n15_head}
"""Policies of which the action part alone has the released size, and reads as many tokens: the whole would not fit in
float32 beside its quantization on a small machine."""


class StandIn(Protocol):
    """What a checkpoint is beside its weights."""

    @property
    def family(self) -> str: ...

    @property
    def shard_bytes(self) -> int | None:
        """Of one file of weights at most; None: all of them are in one."""
        ...

    def write_support(self, directory: Path) -> None:
        """Write everything but the weights."""
        ...


def released(family: str) -> StandIn:
    """A policy of the released size, or one of ACTION_PARTS. Raises `ValueError` if none is known here."""
    made = {**LEROBOT, GrootN15StandIn.family: GrootN15StandIn, **ACTION_PARTS}
    if family not in made:
        raise ValueError(f"there is no stand-in for a policy of family {family!r}; there are {', '.join(made)}")
    return made[family]()


def make(stand_in: StandIn, out: Path, seed: int = 0) -> None:
    """Write a checkpoint into the new directory `out`. Raises `CheckpointError` if it exists."""
    with written_beside(out) as scratch:
        stand_in.write_support(scratch)
        write_weights(weights(stand_in.family, scratch, seed), scratch, stand_in.shard_bytes)
