"""`eval_info.json` as lerobot lays it out, for every policy of an evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omega_qvla.evaluation.eval_info import eval_info, write_eval_info
from omega_qvla.evaluation.results import Evaluation, PolicyResult, describe_machine
from omega_qvla.evaluation.rollout import Episode

TASKS, SEEDS = ("slide", "turn"), (3, 4, 5, 6)


def result(label: str, generator: np.random.Generator) -> PolicyResult:
    outcomes = {(task, seed): bool(generator.random() < 0.6) for seed in SEEDS for task in TASKS}
    episodes = tuple(Episode(task, seed, solved, 10 if solved else 30) for (task, seed), solved in outcomes.items())
    return PolicyResult(label, "float", None, None, 1000, 2, episodes)


@pytest.fixture
def evaluation() -> Evaluation:
    generator = np.random.default_rng(0)
    policies = (result("full precision", generator), result("omega-qvla", generator))
    return Evaluation(describe_machine(), TASKS, SEEDS, 30, 8, policies)


def test_every_policy_has_a_file(evaluation: Evaluation, tmp_path: Path) -> None:
    paths = write_eval_info(evaluation, tmp_path / "info")
    assert [path.parent.name for path in paths] == ["full-precision", "omega-qvla"]
    for path, policy in zip(paths, evaluation.policies, strict=True):
        assert json.loads(path.read_text()) == json.loads(json.dumps(eval_info(evaluation, policy)))


def test_figures_are_those_of_the_episodes(evaluation: Evaluation) -> None:
    for policy in evaluation.policies:
        info, outcomes = eval_info(evaluation, policy), policy.outcomes()
        for entry in info["per_task"]:
            task = entry["task_group"]
            expected = [outcomes[task, seed] for seed in evaluation.seeds]
            assert entry["metrics"]["successes"] == expected
            assert entry["metrics"]["sum_rewards"] == entry["metrics"]["max_rewards"] == [float(s) for s in expected]
            assert info["per_group"][task]["pc_success"] == 100 * policy.success(task).rate
        assert info["overall"]["n_episodes"] == len(policy.episodes)
        assert info["overall"]["pc_success"] == pytest.approx(100 * policy.success().rate)


def test_tasks_of_a_suite_are_one_group(evaluation: Evaluation) -> None:
    named = {"slide": "libero_goal/3", "turn": "libero_goal/7"}
    policies = tuple(
        replace(policy, episodes=tuple(replace(each, task=named[each.task]) for each in policy.episodes))
        for policy in evaluation.policies
    )
    suite = replace(evaluation, tasks=tuple(named.values()), policies=policies)
    info = eval_info(suite, policies[1])
    assert [(each["task_group"], each["task_id"]) for each in info["per_task"]] == [
        ("libero_goal", 3),
        ("libero_goal", 7),
    ]
    assert info["per_group"].keys() == {"libero_goal"}
    assert info["per_group"]["libero_goal"]["pc_success"] == pytest.approx(info["overall"]["pc_success"])


def test_our_statistics_stand_under_a_key_of_their_own(evaluation: Evaluation) -> None:
    reference, other = evaluation.policies
    assert eval_info(evaluation, reference)["omega_qvla"]["paired_with_reference"] is None
    own = eval_info(evaluation, other)["omega_qvla"]
    assert own["reference"] == "full precision" and own["seeds"] == list(evaluation.seeds)
    assert own["paired_with_reference"]["overall"]["wins"] == evaluation.paired(other).wins
    assert own["success"]["slide"]["low"] == other.success("slide").low
    assert set(own["paired_with_reference"]) == {"overall", *TASKS}


def test_keys_are_those_of_lerobot(evaluation: Evaluation) -> None:
    """As `lerobot.scripts.lerobot_eval.eval_policy_all` and `eval_one` return them."""
    info = eval_info(evaluation, evaluation.policies[0])
    videos = {"video_paths", "predicted_video_paths"}
    aggregate = {"avg_sum_reward", "avg_max_reward", "pc_success", "n_episodes", *videos}
    assert set(info) == {"per_task", "per_group", "overall", "omega_qvla"}
    assert all(set(entry) == {"task_group", "task_id", "metrics"} for entry in info["per_task"])
    assert set(info["per_task"][0]["metrics"]) == {"sum_rewards", "max_rewards", "successes", *videos}
    assert set(info["per_group"]["slide"]) == aggregate
    assert set(info["overall"]) == aggregate | {"eval_s", "eval_ep_s"}


def test_names_that_fall_together_are_refused(evaluation: Evaluation, tmp_path: Path) -> None:
    first, second = evaluation.policies
    alike = replace(evaluation, policies=(first, replace(second, label="full-precision")))
    with pytest.raises(ValueError, match="have the same name as directories"):
        write_eval_info(alike, tmp_path / "info")
    assert not (tmp_path / "info").exists()
