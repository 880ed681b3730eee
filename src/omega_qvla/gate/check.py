"""Run a gate: two policies, the same observations, one verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from omega_qvla import api
from omega_qvla.evaluation.benchmark import Benchmark
from omega_qvla.evaluation.fidelity import answers
from omega_qvla.evaluation.metaworld import metaworld_mt10
from omega_qvla.evaluation.recording import RecordedObservation, consecutive
from omega_qvla.evaluation.run import one_thread
from omega_qvla.gate.observing import from_dataset, from_rollouts
from omega_qvla.gate.verdict import Answers, GateReport, Gripper, verdicts
from omega_qvla.pack.checkpoint import is_checkpoint, sha256, verify
from omega_qvla.pack.manifest import CheckpointError, Manifest
from omega_qvla.policies import open_policy
from omega_qvla.policy import Policy
from omega_qvla.runtime.linear import Execution
from omega_qvla.spec import GateSpec, RecipeError, with_settings

OBSERVATIONS = 256


def check(
    directory: Path,
    against: Path,
    *,
    observations: int = OBSERVATIONS,
    dataset: Path | None = None,
    benchmark: Benchmark | None = None,
    gripper: Gripper | None = None,
    settings: Sequence[str] = (),
    execution: Execution = "integer",
    on_progress: api.OnProgress = lambda what, share: None,
) -> GateReport:
    """Hold a quantized checkpoint's actions against those of the checkpoint that it was made from.

    Observations are of full precision's own episodes of `benchmark` (Meta-World's MT10 if none is given), or of a
    local lerobot `dataset`. Limits are those of the checkpoint's recipe, with `settings` such as
    `gate.error_p95=0.2`.

    Raises `CheckpointError` for directories that hold no such pair, `RecipeError` for other settings, `ValueError` or
    `OSError` for observations that cannot be had or do not suit the policies.
    """
    manifest = _pair(directory, against)
    limits = _limits(manifest, settings)
    calibrated_on = () if manifest.calibration is None else manifest.calibration.trajectories
    with one_thread():
        on_progress("loading full precision", 0.0)
        reference = open_policy(against)
        (gripper or Gripper()).index(reference.interface().action_width)
        if dataset is not None:
            observed = from_dataset(dataset, observations, reference.execute_steps, calibrated_on)
        else:
            on_progress("recording full precision's episodes", 0.0)
            benchmark = benchmark or metaworld_mt10()
            gripper = gripper or Gripper(benchmark.gripper, benchmark.gripper_threshold)
            reference.execute_steps = benchmark.execute_steps or reference.execute_steps
            observed = from_rollouts(reference, observations, benchmark, calibrated_on)
        recorded, redrawn = observed.recorded, [replace(item, draw=1) for item in observed.recorded]
        own = _answered(reference, recorded, "full precision", on_progress)
        other = _answered(reference, redrawn, "full precision under other noise", on_progress)
        bounds, executed = reference.action_bounds(), reference.execute_steps
        del reference  # both need not fit into memory
        policy = api.load(directory, execution)
        quantized = _answered(policy, recorded, manifest.plan.recipe.name, on_progress)
    checks, missing = verdicts(
        Answers(own, quantized, other),
        limits,
        gripper or Gripper(),
        bounds=bounds,
        consecutive=consecutive(recorded),
        executed=executed,
    )
    return GateReport(
        policy=manifest.plan.recipe.name,
        execution=policy.execution,
        observations=len(recorded),
        source=observed.source,
        held_out=observed.held_out,
        limits=limits,
        checks=checks,
        not_measured=missing,
    )


def _answered(
    policy: Policy, recorded: Sequence[RecordedObservation], what: str, on_progress: api.OnProgress
) -> np.ndarray:
    """The policy's actions, float64 [N, chunk, D]."""
    parts: list[np.ndarray] = []
    for actions in answers(policy, recorded):
        parts.append(actions)
        on_progress(what, sum(map(len, parts)) / len(recorded))
    return np.concatenate(parts).astype(np.float64)


def _pair(directory: Path, against: Path) -> Manifest:
    """The manifest of a checkpoint that was made from the weights in `against`."""
    manifest = verify(directory)
    if is_checkpoint(against):
        raise CheckpointError(f"{against} is quantized itself; name the checkpoint in floating point")
    for name, digest in manifest.source.sha256.items():
        if name.endswith(".safetensors") and not ((against / name).is_file() and sha256(against / name) == digest):
            raise CheckpointError(f"{directory} was not made from {against}: {name} there is missing or another")
    return manifest


def _limits(manifest: Manifest, settings: Sequence[str]) -> GateSpec:
    """The gate of the checkpoint's recipe, or the default one, with settings."""
    if other := [setting for setting in settings if not setting.startswith("gate.")]:
        raise RecipeError(f"{other[0]!r} is no setting of the gate; write for example gate.error_p95=0.2")
    return with_settings(manifest.plan.recipe, settings).gate or GateSpec()
