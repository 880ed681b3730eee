"""What policies would do along an episode that the reference drives: no error feeds back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omega_qvla.evaluation.recording import RecordedObservation

_DIGITS = 5
"""Of the actions that are written down: more than a plot shows."""


@dataclass(frozen=True)
class ActionTrace:
    """Executed actions of all policies on the observations and under the noise of one held-out episode."""

    task: str
    seed: int
    deviation: float
    """Squared deviation of the compared policies' actions from the reference's, over the variance of the reference's
    on all recorded observations; mean over steps, policies and the dimensions that vary."""
    starts: tuple[int, ...]
    """Step of the episode at which each chunk starts."""
    actions: dict[str, list[list[list[float]]]]
    """By label, [chunk, executed step, action dimension], in physical units; the reference first."""


def extreme_traces(
    recorded: Sequence[RecordedObservation], actions: Mapping[str, np.ndarray], execute_steps: int
) -> tuple[ActionTrace, ...]:
    """Of the recorded episodes that on which the policies deviate most from the reference, and that on which they
    deviate least.

    `actions`: by label, the reference first, float32 [observation, chunk, action dimension]. None without a policy to
    compare.
    """
    if len(actions) < 2 or not recorded:
        return ()
    episodes = list(dict.fromkeys((item.task, item.seed) for item in recorded))
    traces = [_trace(episode, recorded, actions, execute_steps) for episode in episodes]
    ordered = sorted(traces, key=lambda trace: -trace.deviation)
    return (ordered[0],) if len(ordered) == 1 else (ordered[0], ordered[-1])


def _trace(
    episode: tuple[str, int],
    recorded: Sequence[RecordedObservation],
    actions: Mapping[str, np.ndarray],
    execute_steps: int,
) -> ActionTrace:
    chosen = [place for place, item in enumerate(recorded) if (item.task, item.seed) == episode]
    executed = {label: chunks[chosen, :execute_steps].astype(np.float64) for label, chunks in actions.items()}
    reference, *others = executed.values()
    everywhere = next(iter(actions.values()))[:, :execute_steps].astype(np.float64)
    spread = everywhere.reshape(-1, everywhere.shape[-1]).var(axis=0)
    error = np.mean([(other - reference) ** 2 for other in others], axis=(0, 1, 2))
    varying = spread > 0
    deviation = float(np.mean(error[varying] / spread[varying])) if varying.any() else 0.0
    starts = tuple(recorded[place].inference * execute_steps for place in chosen)
    written = {label: np.vectorize(_short)(chunks).tolist() for label, chunks in executed.items()}
    return ActionTrace(*episode, _short(deviation), starts, written)


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
