"""Distances between paired episodes, and the curves over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla.evaluation.recording import RecordedObservation
from omega_qvla.studies import accumulation
from omega_qvla.studies.accumulation import (
    OTHER_NOISE,
    QUANTIZED,
    STUDY,
    OtherNoise,
    curve,
    distances,
    hand_positions,
)
from omega_qvla.studies.study import Options, Result
from omega_qvla.studies.workbench import Workbench, answers

EPISODES = (("reach-v3", 0), ("push-v3", 0))


@pytest.fixture(scope="module")
def driven(bench: Workbench) -> list[RecordedObservation]:
    """Two episodes of full precision, of 8 and 4 inferences."""
    length = 8
    return [
        replace(record, task=EPISODES[i // length][0], seed=0, inference=i % length)
        for i, record in enumerate(bench.held_out)
    ]


@pytest.fixture(scope="module")
def results(
    computed: Callable[..., dict[str, Result]], driven: list[RecordedObservation], bench: Workbench
) -> dict[str, Result]:
    """Every policy strays by 3 cm to the side after the first inference, and its longer episode ends sooner."""
    strayed = [_moved(record, 0.03 * (record.inference > 0)) for record in driven if record.inference < 6]
    return computed(
        accumulation,
        EPISODES=1,
        _driven=lambda checkpoint, episodes: (driven, answers(bench.policy, driven)),
        collect_observations=lambda policy, episodes, benchmark: strayed,
    )


def _moved(record: RecordedObservation, by: float) -> RecordedObservation:
    state = record.observation.state.copy()
    state[0, 1] += by
    return replace(record, observation=replace(record.observation, state=state))


def test_distances_end_with_the_shorter_path() -> None:
    path = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0]], np.float32)
    assert distances(path, path) == [0, 0, 0]
    assert distances(path, path[:2] + np.array([0, 3, 4])) == [5, 5]


def test_hand_is_the_first_three_of_the_state(driven: list[RecordedObservation]) -> None:
    found = hand_positions(driven)
    assert {key: positions.shape for key, positions in found.items()} == {EPISODES[0]: (8, 3), EPISODES[1]: (4, 3)}
    np.testing.assert_array_equal(found[EPISODES[1]][0], driven[8].observation.state[0, :3])


def test_curve_over_episodes_of_different_lengths() -> None:
    found = curve([[1, 2, 3, 4], [3, 4], [5, 6, 7], [7, 8]])
    assert found.mean == (4, 5, 5)  # at the fourth inference one of four is left
    assert found.episodes == (4, 4, 2)
    assert found.low[0] == 2.5 and found.high[0] == 5.5


def test_other_noise_is_the_same_entries_in_another_order(bench: Workbench) -> None:
    record = bench.held_out[0]
    noise = record.noise(bench.policy.noise_shape)
    other = OtherNoise(bench.policy)
    expected = bench.policy.infer(record.observation, noise.flip(1))
    np.testing.assert_array_equal(other.infer(record.observation, noise), expected)
    assert torch.equal(noise.flip(1).sort(1).values, noise.sort(1).values)
    assert not np.array_equal(expected, bench.policy.infer(record.observation, noise))


def test_closed_loop_distance_and_open_loop_error(results: dict[str, Result]) -> None:
    assert list(results)[:4] == [f"policy-{variant}" for variant in (*QUANTIZED, OTHER_NOISE)]
    for result in results.values():
        first, second = result["episodes"]
        assert first["distance_mm"] == [0, *[30.0] * 5] and second["distance_mm"] == [0, 30.0, 30.0, 30.0]
        assert (len(first["action_error"]), len(second["action_error"])) == (8, 4)  # full precision's own length
        assert min(first["action_error"]) > 0


def test_seeds_and_episodes(options: Options) -> None:
    assert STUDY.cells(replace(options, episodes=3))[0].what["seeds"] == (0, 1, 2)
    with pytest.raises(ValueError, match="evaluation"):
        STUDY.cells(replace(options, episodes=200_000))


def test_rendering(results: dict[str, Result], tmp_path: Path) -> None:
    STUDY.render(results, tmp_path)
    text = (tmp_path / "accumulation.md").read_text()
    assert "rtn 30 and 30" in text and "| rtn | 2 | 10 |" in text
    assert (tmp_path / "accumulation.csv").read_text().startswith("source,variant,step,quantity,mean")
    STUDY.render({"twin-rtn": results["twin-rtn"]}, tmp_path)
    assert "## policy" not in (tmp_path / "accumulation.md").read_text()
