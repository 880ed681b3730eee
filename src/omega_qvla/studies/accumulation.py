"""How the error of a quantized policy grows over an episode in closed loop (QVLA Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from omega_qvla.evaluation.metaworld import metaworld_mt10
from omega_qvla.evaluation.recording import RecordedObservation, collect_observations
from omega_qvla.evaluation.results import write_text
from omega_qvla.evaluation.seeds import EVALUATION_FIRST_SEED, EVALUATION_SEEDS, check_within
from omega_qvla.policy import Observation, Policy, PreviousChunk
from omega_qvla.spec import Recipe, read_recipe
from omega_qvla.studies.cells import recipe_cells
from omega_qvla.studies.rendering import COLOURS, REFERENCE_COLOUR, figure, markdown_table, write_csv
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.workbench import answers, open_workbench

EPISODES = 5
"""Per task, if the caller names no number."""
OTHER_NOISE = "other-noise"
QUANTIZED = ("rtn", "omega-qvla", "omega-int4")
HAND = slice(0, 3)
"""Of Meta-World's proprioception: the hand's position in metres."""
MINIMUM_SHARE = 0.5
"""Of the episodes that must still run: they end when they are solved, and the last ones are the hard ones."""
MEASURES = {
    "distance_mm": "closed loop: distance of the hand, mm",
    "action_error": "open loop: RMS error of the next actions",
}


class OtherNoise:
    """A policy under noise that has the same distribution as the episode's but is not it: how far the policy strays
    from itself."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.label, self.execution = policy.label, policy.execution
        self.noise_shape, self.execute_steps = policy.noise_shape, policy.execute_steps

    def infer(
        self, observation: Observation, noise: torch.Tensor, previous: PreviousChunk | None = None
    ) -> np.ndarray:
        return self.policy.infer(observation, noise.flip(1), previous)

    def denoise(self, observation: Observation, noise: torch.Tensor) -> torch.Tensor:
        return self.policy.denoise(observation, noise.flip(1))

    def resident_bytes(self) -> int:
        return self.policy.resident_bytes()


def recipe(variant: str) -> Recipe | None:
    return None if variant == OTHER_NOISE else read_recipe(variant)


def measure(source: str, checkpoint: Path, variant: str, *, tasks: tuple[str, ...], seeds: tuple[int, ...]) -> Result:
    """Per episode and inference: how far the hand is from full precision's in closed loop, and the error of the
    actions executed next in open loop, on full precision's own observations."""
    bench, episodes = open_workbench(checkpoint), tuple((task, seed) for seed in seeds for task in tasks)
    driven, chunks = _driven(checkpoint, episodes)
    with bench.running(recipe(variant)) as policy:
        student = OtherNoise(policy) if variant == OTHER_NOISE else policy
        strayed = hand_positions(collect_observations(student, episodes, metaworld_mt10()))
        executed = slice(0, student.execute_steps)
        errors = (answers(student, driven) - chunks)[:, executed]
    found = []
    for key, positions in hand_positions(driven).items():
        which = [index for index, record in enumerate(driven) if (record.task, record.seed) == key]
        found.append(
            {
                "task": key[0],
                "seed": key[1],
                "distance_mm": [round(1000 * value, 2) for value in distances(positions, strayed[key])],
                "action_error": [round(float(np.sqrt(np.mean(errors[i] ** 2))), 5) for i in which],
            }
        )
    return {"source": source, "variant": variant, "execute_steps": bench.policy.execute_steps, "episodes": found}


@cache
def _driven(checkpoint: Path, episodes: tuple[tuple[str, int], ...]) -> tuple[list[RecordedObservation], np.ndarray]:
    """What full precision met in these episodes, and its chunks."""
    policy = open_workbench(checkpoint).policy
    recorded = collect_observations(policy, episodes, metaworld_mt10())
    return recorded, answers(policy, recorded)


def hand_positions(recorded: Sequence[RecordedObservation]) -> dict[tuple[str, int], np.ndarray]:
    """The hand at every inference, float32 [inferences, 3] in metres, by episode (task, seed)."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for record in recorded:
        found.setdefault((record.task, record.seed), []).append(record.observation.state[0, HAND])
    return {key: np.stack(positions) for key, positions in found.items()}


def distances(reference: np.ndarray, other: np.ndarray) -> list[float]:
    """Between two paths [n, 3] and [m, 3], at every inference that both have."""
    both = min(len(reference), len(other))
    return np.linalg.norm(reference[:both] - other[:both], axis=1).tolist()


@dataclass(frozen=True)
class Curve:
    """A quantity by inference over the episodes that reach it."""

    mean: tuple[float, ...]
    low: tuple[float, ...]
    """First quartile."""
    high: tuple[float, ...]
    """Third quartile."""
    episodes: tuple[int, ...]


def curve(series: Sequence[Sequence[float]]) -> Curve:
    """Over episodes of different lengths; it ends where fewer than MINIMUM_SHARE of them are left."""
    columns = [[value for value in column if value is not None] for column in zip_longest(*series)]
    kept = [column for column in columns if len(column) >= MINIMUM_SHARE * len(series)]
    low, high = (tuple(float(np.percentile(column, q)) for column in kept) for q in (25, 75))
    return Curve(tuple(float(np.mean(c)) for c in kept), low, high, tuple(len(c) for c in kept))


@dataclass(frozen=True)
class Accumulation:
    """See `omega_qvla.studies.study.Study`."""

    name: str = "accumulation"
    summary: str = (
        "From the same initial state under the same noise: the distance between the hand of a policy at W4A4 and "
        "that of full precision by step of the episode, and the error of its actions where full precision drives, "
        "which cannot accumulate. Means over episodes with quartiles, to the step that half of them reach."
    )
    published: str = "QVLA Figure 3"

    def cells(self, options: Options) -> list[Cell]:
        seeds = range(EVALUATION_FIRST_SEED, EVALUATION_FIRST_SEED + (options.episodes or EPISODES))
        check_within(seeds, EVALUATION_SEEDS, "evaluation")
        variants = {variant: recipe(variant) for variant in (*QUANTIZED, OTHER_NOISE)}
        return recipe_cells(options, variants, measure, tasks=options.tasks, seeds=tuple(seeds))

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        sources = dict.fromkeys(result["source"] for result in results.values())
        grouped = {source: [r for r in results.values() if r["source"] == source] for source in sources}
        write_csv(out / f"{self.name}.csv", [row for result in results.values() for row in _rows(result)])
        parts = [f"# {self.name}\n\n{self.summary}\n\n![{self.name}]({self.name}.svg)\n"]
        parts += [f"## {source}\n\n{seen(found)}\n\n{_table(found)}" for source, found in grouped.items()]
        write_text(out / f"{self.name}.md", "\n".join(parts))
        with figure(out / f"{self.name}.svg", 9.4, 0.6 + 3.2 * len(grouped)) as drawn:
            grid = drawn.subplots(len(grouped), len(MEASURES), sharex=True, squeeze=False)
            for line, (source, found) in zip(grid, grouped.items(), strict=True):
                for axes, (name, label) in zip(line, MEASURES.items(), strict=True):
                    for result in found:
                        _plot(axes, result, name)
                    axes.set_title(f"{source}, {label}")
                    axes.set_ylim(bottom=0)
                    axes.grid(axis="y")
            for axes in grid[-1]:
                axes.set_xlabel("step of the episode")
            drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=4)


def seen(found: Sequence[Result]) -> str:
    """Two sentences about one source: what both errors are half-way and at the last step that is shown."""
    closed, opened = (
        "; ".join(f"{result['variant']} {_half_way_and_last(_curve(result, name))}" for result in found)
        for name in MEASURES
    )
    return (
        f"Mean distance of the hand from full precision's half-way and at the last step shown, in mm: {closed}. "
        f"Mean error of the next actions without feedback, at the same steps: {opened}."
    )


def _half_way_and_last(found: Curve) -> str:
    return f"{found.mean[len(found.mean) // 2]:.3g} and {found.mean[-1]:.3g}"


def _curve(result: Result, name: str) -> Curve:
    return curve([episode[name] for episode in result["episodes"]])


def _table(found: Sequence[Result]) -> str:
    quantities = [f"{what}, {where}" for what in ("distance in mm", "action error") for where in ("half-way", "last")]
    columns = ["policy", "episodes", "last step shown", *quantities]
    lines = []
    for result in found:
        curves = [_curve(result, name) for name in MEASURES]
        last = result["execute_steps"] * (len(curves[0].mean) - 1)
        values = [f"{value:.3g}" for c in curves for value in (c.mean[len(c.mean) // 2], c.mean[-1])]
        lines.append([result["variant"], str(len(result["episodes"])), str(last), *values])
    return markdown_table(columns, lines)


def _rows(result: Result) -> list[dict[str, Any]]:
    """One line per quantity and inference."""
    lines = []
    for name in MEASURES:
        found = _curve(result, name)
        for inference, values in enumerate(zip(found.mean, found.low, found.high, found.episodes, strict=True)):
            where = {"step": inference * result["execute_steps"], "quantity": name}
            numbers = dict(zip(("mean", "first_quartile", "third_quartile", "episodes"), values, strict=True))
            lines.append({"source": result["source"], "variant": result["variant"], **where, **numbers})
    return lines


def _plot(axes: Axes, result: Result, name: str) -> None:
    found, variant = _curve(result, name), result["variant"]
    colour = REFERENCE_COLOUR if variant == OTHER_NOISE else COLOURS[QUANTIZED.index(variant)]
    steps = [result["execute_steps"] * inference for inference in range(len(found.mean))]
    label = "full precision, other noise" if variant == OTHER_NOISE else variant
    axes.plot(steps, found.mean, color=colour, label=label)
    axes.fill_between(steps, found.low, found.high, color=colour, alpha=0.15, lw=0)


STUDY = Accumulation()
