"""What a robot would feel of a policy's actions: errors, jerk, jumps between chunks, gripper flips, saturation.

Actions are float64 [N, chunk, D] in physical units, those of two policies on the same N observations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERCENTILES = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
SHORTEST_CHUNK = 4
"""Actions that a third difference takes."""


def error_percentiles(actions: np.ndarray, reference: np.ndarray) -> dict[str, np.ndarray]:
    """Percentiles of |a - r| over observations and chunk positions, each [D]."""
    error = np.abs(actions - reference)
    return {name: np.percentile(error, share, axis=(0, 1)) for name, share in PERCENTILES.items()}


def jerk(actions: np.ndarray) -> np.ndarray:
    """Root mean square of third differences along the chunk, [D]. Chunks have at least `SHORTEST_CHUNK` actions."""
    return np.sqrt(np.mean(np.diff(actions, n=3, axis=1) ** 2, axis=(0, 1)))


def splice_jump(actions: np.ndarray, consecutive: Sequence[tuple[int, int]], executed: int) -> np.ndarray:
    """Root mean square of the step from the last executed action of a chunk to the first of the next, [D].

    `consecutive`: the positions of each chunk and the next; at least one pair.
    """
    before, after = (list(places) for places in zip(*consecutive, strict=True))
    return np.sqrt(np.mean((actions[after, 0] - actions[before, executed - 1]) ** 2, axis=0))


def flips(actions: np.ndarray, reference: np.ndarray, threshold: float, hesitation: float) -> float:
    """Share of commands [N, chunk] that are on the other side of the threshold than the reference's.

    Commands within `hesitation` of the threshold are on neither side.
    """

    def side(commands: np.ndarray) -> np.ndarray:
        return np.sign(commands - threshold) * (np.abs(commands - threshold) > hesitation)

    return float(np.mean(side(actions) * side(reference) < 0))


def saturated(actions: np.ndarray, low: np.ndarray, high: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Whether each action is at a limit [D] of its dimension, or within `margin` [D] of it; bool [N, chunk, D]."""
    return (actions <= low + margin) | (actions >= high - margin)
