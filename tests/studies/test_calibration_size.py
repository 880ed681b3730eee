"""Which trajectories a calibration takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omega_qvla import api
from omega_qvla.evaluation.recording import RecordedObservation
from omega_qvla.evaluation.seeds import CALIBRATION_SEEDS
from omega_qvla.policy import Observation
from omega_qvla.studies import calibration_size
from omega_qvla.studies.calibration_size import RECIPES, REPETITIONS, SIZES, STUDY, judge_size, trajectories
from omega_qvla.studies.study import Options
from omega_qvla.studies.sweep import Variant


def record(episodes: Sequence[tuple[str, int]]) -> list[RecordedObservation]:
    """Two observations of each episode; the state is its seed."""
    return [
        RecordedObservation(task, seed, i, Observation({}, np.full((1, 1), seed, np.float32), (task,)))
        for task, seed in episodes
        for i in range(2)
    ]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rollouts without a simulator."""
    monkeypatch.setattr(calibration_size, "open_workbench", lambda checkpoint: SimpleNamespace(policy=None))
    monkeypatch.setattr(
        calibration_size, "collect_observations", lambda policy, episodes, benchmark: record(episodes)
    )
    trajectories.cache_clear()
    yield
    trajectories.cache_clear()


@pytest.mark.usefixtures("recorded")
def test_repetitions_are_disjoint_and_unevaluated() -> None:
    lists = [list(trajectories(Path("policy"), repetition)) for repetition in range(REPETITIONS)]
    seeds = [seed for episodes in lists for _, seed in episodes]
    assert len(set(seeds)) == len(seeds) == REPETITIONS * max(SIZES)
    assert all(seed in CALIBRATION_SEEDS for seed in seeds)
    assert len({episodes[0][0] for episodes in lists}) == REPETITIONS


@pytest.mark.usefixtures("recorded")
def test_the_first_repetition_begins_with_the_calibration_of_every_other_study(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from omega_qvla.evaluation import recording

    asked: list[tuple[str, int]] = []

    def collect(policy: Any, episodes: Sequence[tuple[str, int]], benchmark: Any) -> list[RecordedObservation]:
        asked.extend(episodes)
        return record(episodes)

    monkeypatch.setattr(recording, "collect_observations", collect)
    api.calibrate_on_rollouts(SimpleNamespace(execute_steps=4))  # type: ignore[arg-type]
    assert list(trajectories(Path("policy"), 0))[: len(asked)] == asked


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_the_beginning_of_its_repetition(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(bench: Any, source: str, checkpoint: Path, variant: Variant, calibration: Any, episodes: Any) -> Any:
        return {"states": calibration.observations.state.ravel().tolist(), "names": calibration.trajectories}

    monkeypatch.setattr(calibration_size, "judge", judge)
    found = judge_size("policy", Path("policy"), Variant("a", "a", None), size, 1, ())
    wanted = list(trajectories(Path("policy"), 1))[:size]
    assert found["states"] == [seed for _, seed in wanted for _ in range(2)]
    assert found["names"] == tuple(f"{task}:{seed}" for task, seed in wanted)
    assert (found["trajectories"], found["repetition"], found["observations"]) == (size, 1, 2 * size)


def test_episodes_are_run_only_if_asked_for(tmp_path: Path) -> None:
    sources = {"policy": api.bundled_checkpoint()}
    for episodes, count in ((None, 0), (3, 6)):
        cells = STUDY.cells(Options(tmp_path, sources, ("reach-v3", "push-v3"), episodes))
        assert len(cells) == REPETITIONS * len(SIZES) * len(RECIPES)
        assert {len(cell.what["episodes"]) for cell in cells} == {count}


def test_the_spread_of_the_repetitions_is_shown(tmp_path: Path) -> None:
    results = {
        f"policy-omega-int4-10-{i}": {
            "source": "policy",
            "label": "omega-int4",
            "trajectories": 10,
            "repetition": i,
            "observations": 160,
            "action_nmse": value,
        }
        for i, value in enumerate((0.01, 0.02, 0.03))
    }
    STUDY.render(results, tmp_path)
    page = (tmp_path / "calibration-size.md").read_text()
    assert "| policy | omega-int4 | 10 | 3 | 2.00e-02 | 1.00e-02–3.00e-02 |" in page
