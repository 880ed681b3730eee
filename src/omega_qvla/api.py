"""The three verbs: make a quantized checkpoint, load one, and judge policies in closed loop.

Rooms are imported when a verb needs them, so that a robot that only loads a policy needs no simulator.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omega_qvla.pack.checkpoint import is_checkpoint, read_manifest, save, sha256
from omega_qvla.pack.manifest import CalibrationRecord, CheckpointError, Manifest, Source
from omega_qvla.pack.unfinished import Unfinished
from omega_qvla.policy import Observation, Policy
from omega_qvla.spec import Recipe, read_recipe

if TYPE_CHECKING:
    from omega_qvla.evaluation.results import Evaluation
    from omega_qvla.runtime.linear import Execution

OnProgress = Callable[[str, float], None]
"""Called with what is being done and the share of the whole that is finished, 0..1."""

CALIBRATION_TRAJECTORIES = 10
"""Unlabelled trajectories that statistics are taken from, as many as in the paper."""


@dataclass(frozen=True)
class CalibrationSet:
    """Observations to take statistics from, and where they come from."""

    observations: Observation
    trajectories: tuple[str, ...]


def bundled_checkpoint() -> Path:
    """The compact pi0.5 trained on Meta-World's MT10 that comes with the package."""
    return Path(str(resources.files("omega_qvla") / "bundled" / "compact-pi05"))


def calibrate_on_rollouts(
    policy: Policy, trajectories: int = CALIBRATION_TRAJECTORIES, tasks: Sequence[str] | None = None
) -> CalibrationSet:
    """Observations of the policy's own Meta-World episodes, from initial states that no evaluation uses.

    Trajectory i is of task i, round robin over `tasks` (all of MT10 by default).
    """
    from omega_qvla.evaluation.metaworld import TASKS
    from omega_qvla.evaluation.recording import collect_observations
    from omega_qvla.evaluation.run import one_thread
    from omega_qvla.evaluation.seeds import CALIBRATION_FIRST_SEED

    names = list(tasks or TASKS)
    episodes = [(names[i % len(names)], CALIBRATION_FIRST_SEED + i) for i in range(trajectories)]
    with one_thread():
        recorded = collect_observations(policy, episodes)
    observations = Observation.concatenate([record.observation for record in recorded])
    return CalibrationSet(observations, tuple(f"{task}:{seed}" for task, seed in episodes))


def calibrate_on_dataset(root: Path, observations: int) -> CalibrationSet:
    """Evenly spaced frames of a local lerobot dataset. Raises `FileNotFoundError` if there is none at `root`."""
    from omega_qvla.policies.dataset import read_observations

    return CalibrationSet(*read_observations(root, observations))


def quantize(
    checkpoint: Path,
    recipe: Recipe | str | Path,
    out: Path,
    *,
    calibration: CalibrationSet | None = None,
    noise_seed: int = 0,
    on_progress: OnProgress = lambda what, share: None,
) -> Manifest:
    """Quantize a floating-point checkpoint into the new directory `out`; returns the manifest written.

    Without `calibration`, the policy's own Meta-World rollouts are used if the recipe needs statistics.

    Finished blocks lie beside `out` until it is written: after an interruption, or an error that is mended, the
    same call goes on from there. What is changed in the recipe for a block makes only that block anew.

    Raises `CheckpointError`, `RecipeError` or `CalibrationError`, whose messages say what to change; then `out`
    does not exist.
    """
    from omega_qvla.calibration import CalibrationError
    from omega_qvla.policies import open_policy
    from omega_qvla.quantization.driver import quantize_policy
    from omega_qvla.quantization.plan import build_plan

    if out.exists():
        raise CheckpointError(f"{out} already exists; choose another directory or remove it")
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    policy = open_policy(checkpoint)
    plan = build_plan(recipe, policy)
    if calibration is None and plan.needs_calibration:
        on_progress("recording calibration trajectories", 0.0)
        calibration = calibrate_on_rollouts(policy)
    source = _source(checkpoint)
    observations = None if calibration is None else calibration.observations
    versions = {name: importlib.metadata.version(name) for name in ("omega-qvla", "torch", "lerobot")}
    origin = {"source": source.sha256, "observations": _digest(observations), "versions": versions}
    unfinished = Unfinished(out, origin)
    try:
        quantized = quantize_policy(
            policy, recipe, observations, noise_seed=noise_seed, unfinished=unfinished, on_progress=on_progress
        )
    except CalibrationError as error:
        if not unfinished.directory.exists():
            raise
        raise CalibrationError(f"{error}; finished blocks are kept, the same command goes on from there") from error
    manifest = Manifest(
        family=policy.family,
        denoising_steps=policy.denoising_steps,
        plan=quantized.plan,
        source=source,
        calibration=_record(calibration, noise_seed) if plan.needs_calibration else None,
        files={},
        versions=versions,
    )
    replaced = {
        f"{linear.name}.{leaf}" for s in quantized.sites for linear in s.linears for leaf in ("weight", "bias")
    }
    kept = {name: tensor for name, tensor in policy.stored_tensors().items() if name not in replaced}
    save(out, manifest, quantized.sites, kept | quantized.changed, policy.support_files())
    unfinished.remove()
    return read_manifest(out)


def load(directory: Path, execution: Execution = "integer") -> Policy:
    """A policy from a quantized checkpoint, or in floating point from a lerobot checkpoint.

    Raises `CheckpointError` if the directory is neither, or is damaged.
    """
    from omega_qvla.policies import open_or_load

    return open_or_load(Path(directory), execution)


def evaluate(
    directories: Sequence[Path],
    *,
    tasks: Sequence[str] | None = None,
    episodes_per_task: int = 20,
    first_seed: int = 0,
    execution: Execution = "integer",
    workers: int = 2,
) -> Evaluation:
    """Judge policies on the same Meta-World episodes under the same noise; the first is the reference.

    Raises `CheckpointError` for a directory that holds no policy, `ValueError` for an unknown task or seeds
    outside the evaluation range.
    """
    from omega_qvla.evaluation.metaworld import TASKS
    from omega_qvla.evaluation.run import Candidate, evaluate_policies

    if unknown := [task for task in tasks or () if task not in TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}; MT10 has {', '.join(TASKS)}")
    labels = _labels(directories)
    candidates = [
        Candidate(partial(_load_labelled, path, execution, label), path)
        for path, label in zip(directories, labels, strict=True)
    ]
    return evaluate_policies(
        candidates,
        tasks=list(tasks or TASKS),
        episodes_per_task=episodes_per_task,
        first_seed=first_seed,
        workers=workers,
    )


def _load_labelled(directory: Path, execution: Execution, label: str) -> Policy:
    policy = load(directory, execution)
    policy.label = label
    return policy


def _labels(directories: Sequence[Path]) -> list[str]:
    """The recipe's name, or `full precision`; where that is ambiguous, the directory's name."""
    names = [read_manifest(d).plan.recipe.name if is_checkpoint(d) else "full precision" for d in directories]
    return [name if names.count(name) == 1 else path.name for name, path in zip(names, directories, strict=True)]


def _source(checkpoint: Path) -> Source:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return Source(checkpoint.resolve().name, {str(p.relative_to(checkpoint)): sha256(p) for p in files})


def _digest(observations: Observation | None) -> str | None:
    if observations is None:
        return None
    digest = hashlib.sha256(json.dumps(observations.instructions).encode())
    for name, array in sorted((observations.images | {"state": observations.state}).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _record(calibration: CalibrationSet | None, noise_seed: int) -> CalibrationRecord | None:
    if calibration is None:
        return None
    return CalibrationRecord(len(calibration.observations), calibration.trajectories, noise_seed)
