"""Sweeps: many variants of one policy, each a cell that is judged by its actions and in closed loop.

All variants of a source meet the same held-out observations, episodes and noise, and its full precision is a cell
of the same sweep.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from omega_qvla import api
from omega_qvla.evaluation.fidelity import action_fidelity, predict
from omega_qvla.evaluation.metaworld import metaworld_mt10
from omega_qvla.evaluation.metaworld.task import TASKS
from omega_qvla.evaluation.results import size_on_disk
from omega_qvla.evaluation.rollout import EnvironmentPool, run_block
from omega_qvla.evaluation.run import FIDELITY_OBSERVATIONS
from omega_qvla.evaluation.seeds import EVALUATION_FIRST_SEED, EVALUATION_SEEDS, FIDELITY_FIRST_SEED, check_within
from omega_qvla.pack.checkpoint import read, sha256
from omega_qvla.pack.inspect import inspect
from omega_qvla.pack.site import PackedSite
from omega_qvla.policies import load_policy
from omega_qvla.policy import Policy
from omega_qvla.spec import Recipe, recipe_to_dict
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.workbench import Workbench, open_workbench, output_errors

FULL_PRECISION = "full-precision"


@dataclass(frozen=True)
class Variant:
    """A recipe that a sweep judges, or full precision."""

    key: str
    label: str
    recipe: Recipe | None
    episodes: int = 0
    """Per task; 0: none."""
    layers: bool = False
    """Whether the outputs of layers are compared too."""


def full_precision(episodes: int) -> Variant:
    return Variant(FULL_PRECISION, "full precision", None, episodes)


def evaluation_episodes(tasks: Sequence[str], per_task: int) -> tuple[tuple[str, int], ...]:
    """The first episodes (task, seed) of each task, the tasks mixed.

    Raises `ValueError` for a task that is not in MT10 and for more episodes than there are evaluation seeds.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}; MT10 has {', '.join(TASKS)}")
    seeds = range(EVALUATION_FIRST_SEED, EVALUATION_FIRST_SEED + per_task)
    check_within(seeds, EVALUATION_SEEDS, "evaluation")
    return tuple((task, seed) for seed in seeds for task in tasks)


def variant_cell(options: Options, source: str, variant: Variant) -> Cell:
    """The cell `SOURCE-KEY` that judges a variant of a source after calibration on its own 10 trajectories."""
    checkpoint = options.sources[source]
    episodes = evaluation_episodes(options.tasks, variant.episodes)
    what = describe(source, checkpoint, variant) | {
        "episodes": episodes,
        "trajectories": api.CALIBRATION_TRAJECTORIES,
    }
    return Cell(f"{source}-{variant.key}", what, partial(judge_calibrated, source, checkpoint, variant, episodes))


def describe(source: str, checkpoint: Path, variant: Variant) -> dict[str, Any]:
    """The part of a cell's description that follows from the source and the variant; what is only said of a
    recipe, such as its summary, is left out."""
    recipe = None if variant.recipe is None else recipe_to_dict(variant.recipe)
    return {
        "source": source,
        "checkpoint": digest(checkpoint),
        "label": variant.label,
        "recipe": None if recipe is None else {key: recipe[key] for key in ("rules", "corrections")},
        "held_out": {"observations": FIDELITY_OBSERVATIONS, "first_seed": FIDELITY_FIRST_SEED},
        "layers": variant.layers,
    }


@cache
def digest(checkpoint: Path) -> str:
    """SHA-256 of the weights of a floating-point checkpoint."""
    return sha256(checkpoint / "model.safetensors")


def judge_calibrated(source: str, checkpoint: Path, variant: Variant, episodes: Sequence[tuple[str, int]]) -> Result:
    """`judge` after calibration on the observations that all recipes of a source share."""
    bench = open_workbench(checkpoint)
    return judge(bench, source, checkpoint, variant, api.CalibrationSet(bench.calibration, ()), episodes)


def judge(
    bench: Workbench,
    source: str,
    checkpoint: Path,
    variant: Variant,
    calibration: api.CalibrationSet,
    episodes: Sequence[tuple[str, int]],
) -> Result:
    """Quantize, count bytes, and compare actions, outputs of layers and episodes (task, seed).

    Integers are simulated, which is the same function and faster here; `execution` is what the recipe allows.
    """
    found: Result = {"source": source, "label": variant.label}
    if variant.recipe is None:
        size = {"codes": None, "scales": None, "total": size_on_disk(checkpoint)}
        return found | {"execution": "float", "recipe": None, "bytes": size} | _rolled_out(bench.policy, episodes)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "quantized"
        api.quantize(checkpoint, variant.recipe, directory, calibration=calibration)
        report = inspect(directory)
        policy = load_policy(directory, "simulated")
        fidelity = action_fidelity(bench.reference, predict(policy, bench.held_out))
        layers = layer_errors(bench, read(directory).sites) if variant.layers else None
    return (
        found
        | {"execution": variant.recipe.execution, "recipe": recipe_to_dict(variant.recipe)}
        | {"bytes": {"codes": report.codes_bytes, "scales": report.scales_bytes, "total": report.total_bytes}}
        | {"action_nmse": fidelity.normalized_mse, "fidelity": asdict(fidelity), "layer_nmse": layers}
        | _rolled_out(policy, episodes)
    )


def layer_errors(bench: Workbench, sites: Sequence[PackedSite]) -> dict[str, float]:
    """Normalized output error on held-out inputs by part and kind, such as `language q_proj`; mean over layers."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, error in output_errors(bench.policy, sites, bench.inputs).items():
        layer = bench.layers[name]
        found[f"{layer.part} {layer.kind}"].append(error.normalized)
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def _rolled_out(policy: Policy, episodes: Sequence[tuple[str, int]]) -> Result:
    """Every episode as task, seed, success and steps."""
    benchmark = metaworld_mt10()
    pool = EnvironmentPool(benchmark.factory)
    try:
        ended = run_block(policy, episodes, pool, max_steps=benchmark.max_steps) if episodes else []
    finally:
        pool.close()
    return {"episodes": [[episode.task, episode.seed, episode.success, episode.steps] for episode in ended]}
