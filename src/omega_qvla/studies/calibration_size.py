"""How many trajectories calibration needs: action error against their number, with its spread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean

from omega_qvla import api
from omega_qvla.evaluation.metaworld import metaworld_mt10
from omega_qvla.evaluation.metaworld.task import TASKS
from omega_qvla.evaluation.recording import RecordedObservation, collect_observations
from omega_qvla.evaluation.results import write_text
from omega_qvla.evaluation.seeds import CALIBRATION_FIRST_SEED
from omega_qvla.policy import Observation
from omega_qvla.spec import read_recipe
from omega_qvla.studies.published import published_section
from omega_qvla.studies.rendering import COLOURS, MARKERS, figure, markdown_table, write_csv
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.sweep import Variant, describe, evaluation_episodes, judge
from omega_qvla.studies.workbench import open_workbench

RECIPES = ("omega-qvla", "omega-int4")
SIZES = (1, 3, 10, 30)
"""Trajectories; a smaller set is the beginning of the larger ones."""
REPETITIONS = 3
"""Disjoint sets of each size."""
STRIDE = 31
"""Seeds between the repetitions: more than the largest size, and each begins with another task."""


@cache
def trajectories(checkpoint: Path, repetition: int) -> dict[tuple[str, int], Observation]:
    """What the policy saw on the longest list of episodes (task, seed) of a repetition."""
    names, first = list(TASKS), STRIDE * repetition
    episodes = [(names[i % len(names)], CALIBRATION_FIRST_SEED + i) for i in range(first, first + max(SIZES))]
    found: dict[tuple[str, int], list[RecordedObservation]] = {episode: [] for episode in episodes}
    for record in collect_observations(open_workbench(checkpoint).policy, episodes, metaworld_mt10()):
        found[record.task, record.seed].append(record)
    return {
        episode: Observation.concatenate([record.observation for record in records])
        for episode, records in found.items()
    }


def judge_size(
    source: str,
    checkpoint: Path,
    variant: Variant,
    size: int,
    repetition: int,
    episodes: Sequence[tuple[str, int]],
) -> Result:
    """`judge` after calibration on the first `size` trajectories of a repetition."""
    chosen = dict(list(trajectories(checkpoint, repetition).items())[:size])
    names = tuple(f"{task}:{seed}" for task, seed in chosen)
    calibration = api.CalibrationSet(Observation.concatenate(list(chosen.values())), names)
    found = judge(open_workbench(checkpoint), source, checkpoint, variant, calibration, episodes)
    return found | {"trajectories": size, "repetition": repetition, "observations": len(calibration.observations)}


@dataclass(frozen=True)
class CalibrationSize:
    """See `omega_qvla.studies.study.Study`."""

    name: str = "calibration-size"
    summary: str = "Action error against the number of calibration trajectories"
    published: str = "QVLA Table 9 (Ω-QVLA: 10 trajectories throughout)"

    def cells(self, options: Options) -> list[Cell]:
        """One repetition of all sizes after the other; no episodes unless the caller asks for them."""
        return [
            _cell(options, source, recipe, size, repetition)
            for repetition in range(REPETITIONS)
            for source in options.sources
            for size in SIZES
            for recipe in RECIPES
        ]

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        """The mean of the repetitions with the smallest and the largest, per source and recipe."""
        groups: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for result in results.values():
            groups[result["source"], result["label"]][result["trajectories"]].append(result["action_nmse"])
        rows = [
            [
                source,
                label,
                str(size),
                str(len(values)),
                f"{mean(values):.2e}",
                f"{min(values):.2e}–{max(values):.2e}",
            ]
            for (source, label), sizes in groups.items()
            for size, values in sorted(sizes.items())
        ]
        columns = ("source", "recipe", "trajectories", "repetitions", "action nMSE, mean", "smallest–largest")
        parts = [
            f"# {self.summary}\n\n![action error by trajectories]({self.name}.svg)\n",
            f"## Measured\n\n{markdown_table(columns, rows)}",
            "Repetitions are calibrated on disjoint trajectories of the full-precision policy; each begins with "
            "another task. All are judged on the same held-out observations.\n",
            published_section("qvla-table-9"),
        ]
        write_text(out / f"{self.name}.md", "\n".join(parts))
        write_csv(out / f"{self.name}.csv", [_csv_row(result) for result in results.values()])
        _plot(groups, out / f"{self.name}.svg")


def _cell(options: Options, source: str, recipe: str, size: int, repetition: int) -> Cell:
    variant = Variant(recipe, recipe, read_recipe(recipe), options.episodes or 0)
    checkpoint = options.sources[source]
    episodes = evaluation_episodes(options.tasks, variant.episodes)
    what = describe(source, checkpoint, variant) | {
        "episodes": episodes,
        "trajectories": size,
        "first_seed": CALIBRATION_FIRST_SEED + STRIDE * repetition,
    }
    compute = partial(judge_size, source, checkpoint, variant, size, repetition, episodes)
    return Cell(f"{source}-{recipe}-{size}-{repetition}", what, compute)


def _csv_row(result: Result) -> dict[str, object]:
    columns = ("source", "label", "trajectories", "repetition", "observations", "action_nmse")
    return {column: result[column] for column in columns}


def _plot(groups: Mapping[tuple[str, str], Mapping[int, Sequence[float]]], path: Path) -> None:
    with figure(path, 6.4, 3.8) as drawn:
        axes = drawn.subplots()
        for number, ((source, label), sizes) in enumerate(groups.items()):
            points = sorted((size, value) for size, values in sizes.items() for value in values)
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.plot([x for x, _ in points], [y for _, y in points], marker, ms=4, mfc="none", color=colour)
            means = [(size, mean(values)) for size, values in sorted(sizes.items())]
            axes.plot([x for x, _ in means], [y for _, y in means], color=colour, marker=marker, ms=4, lw=1)
            axes.lines[-1].set_label(f"{label}, {source}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("calibration trajectories (open: repetitions, filled: mean)")
        axes.set_ylabel("action error (normalized MSE)")
        axes.grid(axis="y")
        drawn.legend(loc="outside lower center", ncols=2)


STUDY = CalibrationSize()
