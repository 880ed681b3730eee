"""Meta-World as a benchmark, and the results that are published of it."""

from pathlib import Path

import pytest

from omega_qvla.evaluation import report, results
from omega_qvla.evaluation.metaworld import metaworld_mt10
from omega_qvla.evaluation.metaworld.suite import MAX_STEPS, metaworld_environment
from omega_qvla.evaluation.metaworld.task import TASKS
from omega_qvla.evaluation.seeds import Partition

RESULTS = Path(__file__).parents[2] / "docs" / "results"
NOT_IN_README = ("steps", "p50 / p95 ms")


def test_meta_world() -> None:
    benchmark = metaworld_mt10()
    assert dict(benchmark.tasks) == TASKS and benchmark.max_steps == MAX_STEPS
    assert benchmark.factory is metaworld_environment and benchmark.execute_steps is None
    names = list(TASKS)
    assert benchmark.calibration_episodes(12) == [(names[i % 10], 500_000 + i) for i in range(12)]
    assert benchmark.calibration_episodes(2, ["push-v3"]) == [("push-v3", 500_000), ("push-v3", 500_001)]
    assert benchmark.evaluation_seeds(20) == range(20) and benchmark.evaluation_seeds(2, 7) == range(7, 9)
    assert benchmark.held_out_seeds(1) == range(600_000, 600_001)
    with pytest.raises(ValueError, match="unknown task 'fly-v3'; MT10 has reach-v3, "):
        benchmark.choose(["fly-v3"])


def test_a_partition_that_overlaps_is_refused() -> None:
    with pytest.raises(ValueError, match="seed 4 is used for both held_out and calibration"):
        Partition(evaluation=range(3), held_out=range(3, 5), calibration=range(4, 9))


@pytest.mark.parametrize("name", ["policy", "twin"])
def test_what_is_published_says_what_was_measured(name: str) -> None:
    evaluation = results.load(RESULTS / f"{name}.json")
    assert evaluation.benchmark == "MT10" and evaluation.tasks == tuple(TASKS)
    assert results.from_json(results.to_json(evaluation)) == evaluation
    assert report.markdown(evaluation) == (RESULTS / name / "report.md").read_text(encoding="utf-8")
    readme = (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    for policy in evaluation.policies:
        cells = dict(zip(report.HEADLINE_COLUMNS, report.headline_row(evaluation, policy), strict=True))
        shown = [cell for column, cell in cells.items() if column not in NOT_IN_README]
        assert f"| {' | '.join(shown)} |" in readme
