"""What quantized policies would do along an episode of full precision: open-loop action traces (Ω-QVLA Figure 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.evaluation.metaworld import metaworld_mt10
from omega_qvla.evaluation.recording import RecordedObservation, collect_observations
from omega_qvla.evaluation.results import write_text
from omega_qvla.evaluation.seeds import FIDELITY_FIRST_SEED
from omega_qvla.spec import Recipe, read_recipe
from omega_qvla.studies.cells import recipe_cells
from omega_qvla.studies.rendering import COLOURS, REFERENCE_COLOUR, figure, markdown_table, write_csv
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.workbench import answers, open_workbench

FULL_PRECISION = "full-precision"
QUANTIZED = ("rtn", "omega-qvla", "omega-int4")
TASKS = ("drawer-open-v3", "pick-place-v3", "peg-insert-side-v3")
"""One that needs little precision, one with a grasp, and one where millimetres count."""
DIMENSIONS = ("x", "y", "z", "gripper")
"""Of a Meta-World action: displacement of the hand and effort of the gripper, each in [-1, 1]."""


def recipe(variant: str) -> Recipe | None:
    return None if variant == FULL_PRECISION else read_recipe(variant)


def measure(source: str, checkpoint: Path, variant: str, *, tasks: tuple[str, ...]) -> Result:
    """The first action of the chunk at every inference of full precision's episode, by task."""
    bench, recorded = open_workbench(checkpoint), _episodes(checkpoint, tasks)
    with bench.running(recipe(variant)) as policy:
        actions = answers(policy, recorded)[:, 0].astype(float)
    traces = {
        task: [action.tolist() for action, record in zip(actions, recorded, strict=True) if record.task == task]
        for task in tasks
    }
    return {"source": source, "variant": variant, "execute_steps": bench.policy.execute_steps, "traces": traces}


@cache
def _episodes(checkpoint: Path, tasks: tuple[str, ...]) -> list[RecordedObservation]:
    """Every observation of one held-out episode of each task that full precision drives."""
    episodes = [(task, FIDELITY_FIRST_SEED) for task in tasks]
    return collect_observations(open_workbench(checkpoint).policy, episodes, metaworld_mt10())


@dataclass(frozen=True)
class Traces:
    """See `omega_qvla.studies.study.Study`."""

    name: str = "traces"
    summary: str = (
        "The first action of every chunk under W4A4, on the observations of one episode that full precision drives "
        "and under its noise: no error feeds back."
    )
    published: str = "Ω-QVLA Figure 8"

    def cells(self, options: Options) -> list[Cell]:
        tasks = tuple(task for task in TASKS if task in options.tasks) or options.tasks[: len(TASKS)]
        variants = {variant: recipe(variant) for variant in (FULL_PRECISION, *QUANTIZED)}
        return recipe_cells(options, variants, measure, tasks=tasks)

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        write_csv(out / f"{self.name}.csv", [row for result in results.values() for row in _rows(result)])
        parts = [f"# {self.name}\n\n{self.summary}\n"]
        for source in dict.fromkeys(result["source"] for result in results.values()):
            found = {r["variant"]: r for r in results.values() if r["source"] == source}
            picture = f"{self.name}-{source}.svg"
            _plot(found, out / picture)
            parts.append(f"## {source}\n\n![{self.name}]({picture})\n")
            if found.keys() > {FULL_PRECISION}:
                parts.append(f"{seen(found)}\n\n{_table(found)}")
        write_text(out / f"{self.name}.md", "\n".join(parts))


Found = Mapping[str, Result]
"""The results of one source by variant."""


def deviation(found: Found, variant: str, task: str) -> np.ndarray:
    """The variant's actions minus full precision's, float64 [inferences, dimensions]."""
    return np.subtract(found[variant]["traces"][task], found[FULL_PRECISION]["traces"][task])


def seen(found: Found) -> str:
    """Two sentences about one source: the typical and the largest deviation of each recipe."""
    tasks = list(found[FULL_PRECISION]["traces"])
    every = {v: np.concatenate([deviation(found, v, task) for task in tasks]) for v in QUANTIZED if v in found}
    typical = ", ".join(f"{variant} {_rms(error):.3f}" for variant, error in every.items())
    largest = ", ".join(f"{variant} {np.abs(error).max():.2f}" for variant, error in every.items())
    return (
        f"Root mean square deviation from full precision's actions over all traces: {typical}. "
        f"Largest single deviation: {largest}."
    )


def _table(found: Found) -> str:
    columns = ("task", *(f"{v}, {what}" for v in QUANTIZED if v in found for what in ("RMS", "largest")))
    lines = []
    for task in found[FULL_PRECISION]["traces"]:
        errors = [deviation(found, variant, task) for variant in QUANTIZED if variant in found]
        figures = [text for error in errors for text in (f"{_rms(error):.3f}", f"{np.abs(error).max():.2f}")]
        lines.append([task, *figures])
    return markdown_table(columns, lines)


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2)))


def _rows(result: Result) -> list[dict[str, Any]]:
    return [
        {"source": result["source"], "variant": result["variant"], "task": task, "inference": inference}
        | dict(zip(DIMENSIONS, action, strict=True))
        for task, actions in result["traces"].items()
        for inference, action in enumerate(actions)
    ]


def _plot(found: Found, path: Path) -> None:
    first = next(iter(found.values()))
    with figure(path, 9.4, 0.6 + 1.6 * len(DIMENSIONS)) as drawn:
        grid = drawn.subplots(len(DIMENSIONS), len(first["traces"]), sharex="col", sharey="row", squeeze=False)
        for column, task in enumerate(first["traces"]):
            for variant, result in found.items():
                actions = np.array(result["traces"][task])
                steps = result["execute_steps"] * np.arange(len(actions))
                for axes, values in zip(grid[:, column], actions.T, strict=True):
                    axes.plot(steps, values, label=variant, **_line(variant))
            grid[0, column].set_title(task.removesuffix("-v3"))
            grid[-1, column].set_xlabel("step of the episode")
        for axes, dimension in zip(grid[:, 0], DIMENSIONS, strict=True):
            axes.set_ylabel(dimension)
        drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=len(found))


def _line(variant: str) -> dict[str, Any]:
    if variant == FULL_PRECISION:
        return {"color": REFERENCE_COLOUR, "lw": 3.0, "alpha": 0.6}
    return {"color": COLOURS[QUANTIZED.index(variant)], "lw": 1.0}


STUDY = Traces()
