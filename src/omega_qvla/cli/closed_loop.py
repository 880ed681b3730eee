"""Commands that let policies act: evaluate, reproduce, demo."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from omega_qvla import api
from omega_qvla.cli.benchmark_options import Env, EnvOption, ProfileOption, SuiteOption, chosen_benchmark
from omega_qvla.cli.shared import DEFAULT_RECIPE, Execution, RayOption, WorkersOption, app, progress, workers_of
from omega_qvla.cli.tables import RECIPE_TABLE_WIDTH, print_wide
from omega_qvla.spec import Recipe, read_recipe, with_settings

if TYPE_CHECKING:
    from omega_qvla.evaluation.results import Evaluation


@app.command()
def evaluate(
    directories: Annotated[
        list[Path], typer.Argument(help="Policies to compare, quantized or not; the first is the reference.")
    ],
    env: EnvOption = Env.metaworld,
    suite: SuiteOption = None,
    profile: ProfileOption = None,
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; all if empty.")] = "",
    episodes: Annotated[int, typer.Option("--episodes", "--trials", min=1, help="Episodes per task.")] = 20,
    seed: Annotated[
        int | None, typer.Option(min=0, help="First initial state; that of the benchmark or profile if not given.")
    ] = None,
    workers: WorkersOption = None,
    ray: RayOption = "",
    execution: Annotated[Execution, typer.Option(help="Arithmetic of executable recipes.")] = Execution.integer,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every episode and figure here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write report.md and report.html into this directory.")] = None,
    eval_info: Annotated[
        Path | None, typer.Option(help="Write POLICY/eval_info.json in lerobot-eval's layout into this directory.")
    ] = None,
) -> None:
    """Run policies on the same episodes under the same noise, and compare them."""
    from omega_qvla.evaluation.eval_info import write_eval_info
    from omega_qvla.evaluation.report import table, write_report
    from omega_qvla.evaluation.results import save

    evaluation = api.evaluate(
        directories,
        benchmark=chosen_benchmark(env, suite, profile),
        tasks=[task.strip() for task in tasks.split(",") if task.strip()] or None,
        episodes_per_task=episodes,
        first_seed=seed,
        execution=execution.value,
        workers=workers_of(workers, ray),
    )
    print(table(evaluation))
    if json_file is not None:
        save(evaluation, json_file)
    if eval_info is not None:
        write_eval_info(evaluation, eval_info)
    if report is not None:
        write_report(evaluation, report)
        print(f"report: {report / 'report.html'}")


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="A study; without a name they are listed.")] = "",
    out: Annotated[Path, typer.Option(help="Directory for results, and for what is needed to go on.")] = Path(
        "runs/reproduce"
    ),
    tasks: Annotated[str, typer.Option(help="Meta-World tasks, separated by commas; all of MT10 if empty.")] = "",
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes per task instead of the study's own.")] = None,
    only: Annotated[str | None, typer.Option(help="Compute only cells whose key matches this expression.")] = None,
    workers: WorkersOption = None,
    ray: RayOption = "",
) -> None:
    """Rebuild a table or figure of the papers on the bundled policy and its outlier-matched twin.

    A study consists of cells, which are kept as soon as they are computed: the same command goes on after an
    interruption and computes only what is missing.
    """
    from omega_qvla.evaluation.metaworld.task import TASKS
    from omega_qvla.studies import STUDIES
    from omega_qvla.studies.study import Options, run_study
    from omega_qvla.studies.twin import standard_sources

    if name not in STUDIES:
        if name:
            raise ValueError(f"there is no study {name!r}; there are {', '.join(STUDIES)}")
        table = Table("study", "repeats", "summary")
        for study in STUDIES.values():
            table.add_row(study.name, study.published, study.summary)
        print_wide(table, RECIPE_TABLE_WIDTH)
        return
    chosen = tuple(task.strip() for task in tasks.split(",") if task.strip()) or tuple(TASKS)
    out = out.absolute()  # workers elsewhere have working directories of their own
    options = Options(out, standard_sources(out), chosen, episodes, only)
    run_study(STUDIES[name], options, workers_of(workers, ray))
    print(f"report: {out / name}.md")


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; must not exist. Default: a new one below runs/.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes per task.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A lerobot checkpoint of a Meta-World policy instead of the bundled one.")
    ] = None,
) -> None:
    """Quantize a policy naively, by the paper and by default, judge all of them in closed loop, write the report."""
    from omega_qvla.evaluation.report import table, write_report
    from omega_qvla.evaluation.results import save

    started = time.monotonic()
    out = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    source = checkpoint or api.bundled_checkpoint()
    with progress() as on_progress:
        on_progress("recording calibration trajectories", 0.0)
        calibration = api.calibrate_on_rollouts(api.load(source))
        for recipe in demo_recipes():
            api.quantize(source, recipe, out / recipe.name, calibration=calibration, on_progress=on_progress)
    evaluation = api.evaluate(
        [source, *(out / recipe.name for recipe in demo_recipes())], episodes_per_task=episodes, workers=workers
    )
    save(evaluation, out / "evaluation.json")
    write_report(evaluation, out)
    print(table(evaluation))
    print(f"report: {out / 'report.html'}")
    print(json.dumps(_demo_line(evaluation, out, time.monotonic() - started)))


def demo_recipes() -> list[Recipe]:
    """The naive baseline, the paper's method and the default, all at W4A4."""
    return [
        with_settings(read_recipe("rtn"), [], name="rtn-w4a4"),
        read_recipe("omega-qvla"),
        read_recipe(DEFAULT_RECIPE),
    ]


def _demo_line(evaluation: Evaluation, out: Path, seconds: float) -> dict[str, Any]:
    """The one line of JSON in which the demo ends."""
    policies = {
        policy.label: {
            "execution": policy.execution,
            "successes": policy.success().successes,
            "episodes": policy.success().episodes,
            "action_nmse": None if policy.fidelity is None else policy.fidelity.normalized_mse,
            "bytes_on_disk": policy.bytes_on_disk,
        }
        for policy in evaluation.policies
    }
    return {"seconds": round(seconds, 1), "report": str(out / "report.html"), "policies": policies}
