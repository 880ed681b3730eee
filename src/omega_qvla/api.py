"""The three verbs: make a quantized checkpoint, load one, and judge policies in closed loop.

Rooms are imported when a verb needs them, so that a robot that only loads a policy needs no simulator.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omega_qvla.pack.checkpoint import is_checkpoint, read_manifest, save, scratch_beside, sha256
from omega_qvla.pack.manifest import CalibrationRecord, CheckpointError, Manifest, Plan, Source
from omega_qvla.pack.stream import Tensors, TensorSource
from omega_qvla.pack.unfinished import Unfinished
from omega_qvla.policy import Observation, Policy, QuantizablePolicy
from omega_qvla.spec import Recipe, RecipeError, read_recipe

if TYPE_CHECKING:
    from omega_qvla.evaluation.benchmark import Benchmark
    from omega_qvla.evaluation.memory import ResidentMemory
    from omega_qvla.evaluation.results import Evaluation
    from omega_qvla.evaluation.workers import Workers
    from omega_qvla.policies.base import AdaptedPolicy
    from omega_qvla.quantization.driver import Room
    from omega_qvla.quantization.preflight import Preflight
    from omega_qvla.runtime.linear import Execution

OnProgress = Callable[[str, float], None]
"""Called with what is being done and the share of the whole that is finished, 0..1."""

CALIBRATION_TRAJECTORIES = 10
"""Unlabelled trajectories that statistics are taken from, as many as in the paper."""

STREAMED_ABOVE = 2**30
"""Bytes of weights above which a checkpoint is quantized without ever being whole in memory."""


@dataclass(frozen=True)
class CalibrationSet:
    """Observations to take statistics from, and where they come from."""

    observations: Observation
    trajectories: tuple[str, ...]


def bundled_checkpoint() -> Path:
    """The compact pi0.5 trained on Meta-World's MT10 that comes with the package."""
    return Path(str(resources.files("omega_qvla") / "bundled" / "compact-pi05"))


def benchmark_named(env: str = "metaworld", suite: str | None = None, profile: str | Path | None = None) -> Benchmark:
    """Meta-World's MT10 (`metaworld`), or a suite of it or of LIBERO (`libero`) as a harness runs it, its profile.

    Raises `ValueError` for names that do not fit, and `ImportError` or `LiberoError` if the simulator, lerobot or
    LIBERO's assets are not installed.
    """
    from omega_qvla.evaluation.libero import libero_suite
    from omega_qvla.evaluation.metaworld import metaworld_suite

    if env == "libero":
        return libero_suite(suite, profile)
    if env != "metaworld":
        raise ValueError(f"there is no benchmark {env!r}; there are metaworld and libero")
    return metaworld_suite(suite, profile)


def calibrate_on_rollouts(
    policy: Policy,
    trajectories: int = CALIBRATION_TRAJECTORIES,
    tasks: Sequence[str] | None = None,
    benchmark: Benchmark | None = None,
) -> CalibrationSet:
    """Observations of the policy's own episodes of a benchmark, Meta-World's MT10 if none is given, from initial
    states that no evaluation uses.

    Trajectory i is of task i, round robin over `tasks` (all by default). Raises `ValueError` for more trajectories
    than there are initial states.
    """
    from omega_qvla.evaluation.metaworld import metaworld_mt10
    from omega_qvla.evaluation.recording import collect_observations, spread
    from omega_qvla.evaluation.run import one_thread

    benchmark = benchmark or metaworld_mt10()
    episodes = benchmark.calibration_episodes(trajectories, tasks)
    with one_thread(), _executing(policy, benchmark):
        recorded = collect_observations(policy, episodes, benchmark)
    kept = spread(recorded, benchmark.calibration_observations or len(recorded))
    observations = Observation.concatenate([record.observation for record in kept])
    return CalibrationSet(observations, tuple(f"{task}:{seed}" for task, seed in episodes))


@contextmanager
def _executing(policy: Policy, benchmark: Benchmark) -> Iterator[None]:
    """While open, the policy executes as many actions of a chunk as the benchmark wants."""
    own = policy.execute_steps
    policy.execute_steps = benchmark.execute_steps or own
    try:
        yield
    finally:
        policy.execute_steps = own


def calibrate_on_dataset(root: Path, observations: int) -> CalibrationSet:
    """Evenly spaced frames of a local lerobot dataset. Raises `FileNotFoundError` if there is none at `root`."""
    from omega_qvla.policies.dataset import read_observations

    return CalibrationSet(*read_observations(root, observations))


def plan(checkpoint: Path, recipe: Recipe | str | Path) -> Plan:
    """What a recipe would do to each linear of a floating-point checkpoint, of which only headers are read.

    Raises `CheckpointError` or `RecipeError` as `quantize` does.
    """
    from omega_qvla.policies import outline_policy
    from omega_qvla.quantization.plan import build_plan

    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    return build_plan(recipe, outline_policy(checkpoint))


def quantize(
    checkpoint: Path,
    recipe: Recipe | str | Path,
    out: Path,
    *,
    calibration: CalibrationSet | None = None,
    trajectories: int = CALIBRATION_TRAJECTORIES,
    benchmark: Benchmark | None = None,
    noise_seed: int = 0,
    memory_budget: int | None = None,
    on_preflight: Callable[[Preflight], None] = lambda preflight: None,
    on_progress: OnProgress = lambda what, share: None,
) -> Manifest:
    """Quantize a floating-point checkpoint into the new directory `out`; returns the manifest written.

    Without `calibration`, `trajectories` of the policy's own rollouts on `benchmark`, Meta-World's MT10 if none is
    given, are used if the recipe needs statistics.

    A checkpoint of more than STREAMED_ABOVE bytes is never whole in memory: its blocks are read, quantized and
    written one after the other, within `memory_budget` bytes of physical memory if that is given. `on_preflight` is
    told what such a run needs before it starts. Methods that look at several blocks at a time need the policy whole.

    Finished blocks lie beside `out` until it is written: after an interruption, or an error that is mended, the
    same call goes on from there. What is changed in the recipe for a block makes only that block anew.

    Raises `CheckpointError`, `RecipeError`, `CalibrationError` or `ResourceError`, whose messages say what to change;
    then `out` does not exist.
    """
    from omega_qvla.policies import open_policy
    from omega_qvla.quantization.driver import needs_whole_policy
    from omega_qvla.quantization.plan import build_plan

    if out.exists():
        raise CheckpointError(f"{out} already exists; choose another directory or remove it")
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    large = _weight_bytes(checkpoint) > STREAMED_ABOVE or memory_budget is not None
    policy = open_policy(checkpoint, streamed=large)
    plan = build_plan(recipe, policy)
    if large and needs_whole_policy(plan):
        if memory_budget is not None:
            raise RecipeError(
                f"recipe {recipe.name!r} needs the whole policy in memory and cannot keep to a budget; leave out the "
                "budget, or choose a recipe that works block by block"
            )
        policy, large = open_policy(checkpoint), False
    if calibration is None and plan.needs_calibration:
        on_progress("recording calibration trajectories", 0.0)
        calibration = calibrate_on_rollouts(policy, trajectories, benchmark=benchmark)
    source = source_of(checkpoint)
    with scratch_beside(out, "activations") as scratch:
        room = None
        if large:
            needs = _preflight(policy, plan, calibration, memory_budget, scratch)
            on_preflight(needs)
            room = needs.room
        return write_quantized(
            policy,
            recipe,
            out,
            source=source,
            libraries=("lerobot",),
            calibration=calibration,
            noise_seed=noise_seed,
            room=room,
            on_progress=on_progress,
        )


def write_quantized(
    policy: QuantizablePolicy,
    recipe: Recipe,
    out: Path,
    *,
    source: Source,
    libraries: Sequence[str] = (),
    calibration: CalibrationSet | None,
    noise_seed: int = 0,
    room: Room | None = None,
    on_progress: OnProgress = lambda what, share: None,
) -> Manifest:
    """What `quantize` does once the policy is open. `libraries`: of which the manifest states the versions.

    Raises as `quantize` does.
    """
    from omega_qvla.calibration import CalibrationError
    from omega_qvla.policies.lerobot_directory import lerobot_files
    from omega_qvla.quantization import quantize_policy

    observations = None if calibration is None else calibration.observations
    versions = {name: importlib.metadata.version(name) for name in ("omega-qvla", "torch", *libraries)}
    origin = {"source": source.sha256, "observations": _digest(observations), "versions": versions}
    unfinished = Unfinished(out, origin)
    try:
        quantized = quantize_policy(
            policy,
            recipe,
            observations,
            noise_seed=noise_seed,
            room=room,
            unfinished=unfinished,
            on_progress=on_progress,
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
        calibration=_record(calibration, noise_seed) if quantized.plan.needs_calibration else None,
        files={},
        versions=versions,
    )
    kept: Tensors = {**_kept(policy, quantized.plan), **quantized.changed}
    declarations = lerobot_files(policy, quantized.plan)
    save(out, manifest, quantized.sites, kept, policy.support_files(), declarations)
    unfinished.remove()
    return read_manifest(out)


def load(directory: Path, execution: Execution = "integer") -> Policy:
    """A policy from a quantized checkpoint, or in floating point from a lerobot checkpoint.

    Raises `CheckpointError` if the directory is neither, or is damaged.
    """
    from omega_qvla.policies import open_or_load

    return open_or_load(Path(directory), execution)


def resident_memory(directory: Path) -> ResidentMemory:
    """What a checkpoint takes of physical memory when it is loaded and idle, beyond its libraries.

    Measured in a new process. Raises as `load` does, and `OSError` on systems that do not tell.
    """
    from omega_qvla.evaluation.memory import measure_resident_memory

    libraries = ("omega_qvla.policies.pi05", "omega_qvla.policies.smolvla", "omega_qvla.policies.groot_n17")
    return measure_resident_memory(partial(load, directory), libraries).growth


def evaluate(
    directories: Sequence[Path],
    *,
    tasks: Sequence[str] | None = None,
    benchmark: Benchmark | None = None,
    episodes_per_task: int = 20,
    first_seed: int | None = None,
    execution: Execution = "integer",
    workers: Workers = 2,
) -> Evaluation:
    """Judge policies on the same episodes under the same noise; the first is the reference.

    Without `benchmark` on Meta-World's MT10. `first_seed`: the first initial state, or that of the benchmark.

    On a Ray cluster the directories are opened where its workers run, under these names.

    Raises `CheckpointError` for a directory that holds no policy, `ValueError` for an unknown task, seeds outside the
    evaluation range, or a policy that was calibrated on an episode that it would be judged on.
    """
    from omega_qvla.evaluation.metaworld import metaworld_mt10
    from omega_qvla.evaluation.run import Candidate, evaluate_policies
    from omega_qvla.policies.bytes_by_part import bytes_by_part

    benchmark = benchmark or metaworld_mt10()
    tasks = benchmark.choose(tasks)
    judged = (benchmark.evaluation_seeds(episodes_per_task, first_seed), benchmark.partition.held_out)
    for directory in filter(is_checkpoint, directories):
        _check_unseen(directory, tasks, judged)
    names = labels(directories)
    candidates = [
        Candidate(
            partial(_load_for, benchmark.execute_steps, path.absolute(), execution, label), path, bytes_by_part(path)
        )
        for path, label in zip(directories, names, strict=True)
    ]
    return evaluate_policies(
        candidates,
        benchmark,
        tasks=tasks,
        episodes_per_task=episodes_per_task,
        first_seed=first_seed,
        workers=workers,
    )


def _check_unseen(directory: Path, tasks: Sequence[str], judged: Sequence[range]) -> None:
    calibration = read_manifest(directory).calibration
    for trajectory in () if calibration is None else calibration.trajectories:
        task, _, seed = trajectory.rpartition(":")
        if task in tasks and seed.isdigit() and any(int(seed) in seeds for seeds in judged):
            raise ValueError(
                f"{directory} was calibrated on {trajectory}, which it would be judged on; evaluate other initial "
                "states (--seed, --episodes), or quantize it with the profile that it is evaluated with"
            )


def _load_for(execute_steps: int | None, directory: Path, execution: Execution, label: str) -> Policy:
    policy = load(directory, execution)
    policy.label = label
    policy.execute_steps = execute_steps or policy.execute_steps
    return policy


def labels(directories: Sequence[Path]) -> list[str]:
    """The recipe's name, or `full precision`; where that is ambiguous, the directory's name."""
    names = [read_manifest(d).plan.recipe.name if is_checkpoint(d) else "full precision" for d in directories]
    return [name if names.count(name) == 1 else path.name for name, path in zip(names, directories, strict=True)]


def source_of(checkpoint: Path) -> Source:
    """The files of a directory and their hashes."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return Source(checkpoint.resolve().name, {str(p.relative_to(checkpoint)): sha256(p) for p in files})


def _preflight(
    policy: AdaptedPolicy, plan: Plan, calibration: CalibrationSet | None, budget: int | None, scratch: Path
) -> Preflight:
    from omega_qvla.quantization.preflight import preflight

    return preflight(
        policy,
        plan,
        None if calibration is None else calibration.observations,
        budget=budget,
        scratch=scratch,
        kept_bytes=sum(source.nbytes for source in _kept(policy, plan).values()),
    )


def _kept(policy: QuantizablePolicy, plan: Plan) -> dict[str, TensorSource]:
    """The tensors that stay in floating point, to be read when they are written."""
    stored = policy.stored_tensors()
    quantized = [linear.name for linear in plan.linears if linear.site is not None]
    replaced = {f"{name}.{leaf}" for name in quantized for leaf in ("weight", "bias")}
    return {
        name: TensorSource(stored.dtype(name), stored.shape(name), partial(stored.pieces, name))
        for name in stored.names()
        if name not in replaced
    }


def _weight_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


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
