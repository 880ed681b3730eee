"""How far a policy's actions are from the reference's on the same observations under the same noise.

Similarity by cosine alone is blind to wrong scales, so errors are reported next to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from omega_qvla.evaluation.recording import RecordedObservation
from omega_qvla.policy import Observation, Policy

FIDELITY_BATCH = 8


@dataclass(frozen=True)
class Fidelity:
    """Action error against the reference policy over N observations.

    Normalized MSE of dimension d: sum of (a − r)² over sum of (r − mean r)², over observations and chunk
    positions, r being the reference's actions. 0 is equality, 1 is no better than a constant action.
    """

    observations: int
    normalized_mse: float
    """Mean over the dimensions that vary: each counts alike, whatever its unit."""
    mse: float
    """Mean of (a − r)² in squared physical units."""
    normalized_mse_per_dimension: tuple[float | None, ...]
    """`None` where the reference's actions do not vary."""
    cosine: float
    """Mean over observations of the cosine between whole chunks; a pair of zero chunks counts 1."""
    absolute_error_p50: float
    absolute_error_p95: float
    absolute_error_p99: float
    """Percentiles of |a − r| over observations, chunk positions and dimensions, in physical units."""
    normalized_mse_per_step: tuple[float | None, ...]
    """After each denoising step: the ratio of the two sums over all dimensions, which share one scale."""
    gripper_flips: float
    """Share of actions whose gripper command is on the other side of its threshold than the reference's."""


@dataclass(frozen=True)
class Predictions:
    """What a policy answered to N observations."""

    actions: np.ndarray
    """float32 [N, chunk, action dimension]"""
    traces: np.ndarray
    """float32 [steps, N, chunk, padded action dimension]"""


def predict(policy: Policy, recorded: Sequence[RecordedObservation], batch: int = FIDELITY_BATCH) -> Predictions:
    """The policy's answers to recorded observations under each one's own noise; N is len(recorded).

    Raises `ValueError` if there are no observations or an answer is not finite.
    """
    if not recorded:
        raise ValueError("there are no observations to compare actions on")
    actions, traces = [], []
    for observation, noise in _batches(policy, recorded, batch):
        actions.append(policy.infer(observation, noise))
        traces.append(policy.denoise(observation, noise).float().cpu().numpy())
    predictions = Predictions(np.concatenate(actions), np.concatenate(traces, axis=1))
    if not (np.isfinite(predictions.actions).all() and np.isfinite(predictions.traces).all()):
        raise ValueError(f"policy {policy.label!r} gave an action that is not finite on a held-out observation")
    return predictions


def answers(
    policy: Policy, recorded: Sequence[RecordedObservation], batch: int = FIDELITY_BATCH
) -> Iterator[np.ndarray]:
    """The actions of `predict` alone, float32 [batch, chunk, action dimension] at a time.

    Raises `ValueError` if an answer is not finite.
    """
    for observation, noise in _batches(policy, recorded, batch):
        actions = policy.infer(observation, noise)
        if not np.isfinite(actions).all():
            raise ValueError(f"policy {policy.label!r} gave an action that is not finite on a held-out observation")
        yield actions


def action_fidelity(
    reference: Predictions, policy: Predictions, gripper: int | None = -1, gripper_threshold: float = 0.0
) -> Fidelity:
    """Compare a policy's answers with the reference's.

    `gripper` is the index of the gripper's dimension, whose command turns at `gripper_threshold`, or `None` for a
    robot without one. Padded dimensions of the traces, those beyond the action's, are left out. Raises `ValueError`
    if shapes differ or the reference's actions do not vary at all.
    """
    _check_shapes(reference, policy)
    wanted, actual = reference.actions.astype(np.float64), policy.actions.astype(np.float64)
    error = actual - wanted
    per_dimension = tuple(
        _normalized(error[..., d], wanted[..., d] - wanted[..., d].mean()) for d in range(wanted.shape[-1])
    )
    varying = [value for value in per_dimension if value is not None]
    if not varying:
        raise ValueError("the reference's actions do not vary, so no error can be relative to them")
    p50, p95, p99 = (float(value) for value in np.percentile(np.abs(error), [50, 95, 99]))
    flips = 0.0
    if gripper is not None:
        below = [commands[..., gripper] < gripper_threshold for commands in (actual, wanted)]
        flips = float(np.mean(below[0] != below[1]))
    return Fidelity(
        observations=len(wanted),
        normalized_mse=float(np.mean(varying)),
        mse=float(np.mean(error**2)),
        normalized_mse_per_dimension=per_dimension,
        cosine=_mean_cosine(wanted, actual),
        absolute_error_p50=p50,
        absolute_error_p95=p95,
        absolute_error_p99=p99,
        normalized_mse_per_step=_per_step(reference.traces, policy.traces, wanted.shape[-1]),
        gripper_flips=flips,
    )


def _batches(
    policy: Policy, recorded: Sequence[RecordedObservation], batch: int
) -> Iterator[tuple[Observation, torch.Tensor]]:
    """Observations, at most `batch` at a time, each with its own noise."""
    for start in range(0, len(recorded), batch):
        part = recorded[start : start + batch]
        noise = torch.cat([item.noise(policy.noise_shape) for item in part])
        yield Observation.concatenate([item.observation for item in part]), noise


def _check_shapes(reference: Predictions, policy: Predictions) -> None:
    for name, wanted, actual in (
        ("actions", reference.actions.shape, policy.actions.shape),
        ("denoising traces", reference.traces.shape, policy.traces.shape),
    ):
        if wanted != actual:
            raise ValueError(f"{name} have shape {actual}, those of the reference {wanted}")


def _normalized(error: np.ndarray, spread: np.ndarray) -> float | None:
    total = float(np.sum(spread**2))
    return float(np.sum(error**2)) / total if total > 0 else None


def _per_step(reference: np.ndarray, policy: np.ndarray, dimensions: int) -> tuple[float | None, ...]:
    wanted = reference[..., :dimensions].astype(np.float64)
    error = policy[..., :dimensions].astype(np.float64) - wanted
    centred = wanted - wanted.mean(axis=(1, 2), keepdims=True)
    return tuple(_normalized(error[step], centred[step]) for step in range(len(wanted)))


def _mean_cosine(wanted: np.ndarray, actual: np.ndarray) -> float:
    flat, other = wanted.reshape(len(wanted), -1), actual.reshape(len(actual), -1)
    norms = np.linalg.norm(flat, axis=1) * np.linalg.norm(other, axis=1)
    equal = np.where((flat == other).all(axis=1), 1.0, 0.0)
    safe = np.where(norms > 0, norms, 1.0)
    return float(np.mean(np.where(norms > 0, (flat * other).sum(axis=1) / safe, equal)))
