"""Blocks and worker processes."""

import pytest
from line_world import TASKS, broken, full_precision, make_line, quantized

from omega_qvla.evaluation.jobs import BLOCK_EPISODES, EvaluationError, blocks, evaluate


def test_blocks_mix_tasks_and_hold_every_episode_once() -> None:
    cut = blocks(TASKS, range(20))
    assert [len(block) for block in cut] == [BLOCK_EPISODES] * 3 + [60 - 3 * BLOCK_EPISODES]
    assert len({episode for block in cut for episode in block}) == 60
    assert {task for task, _ in cut[0]} == set(TASKS)


@pytest.mark.parametrize(("tasks", "seeds"), [((), (1,)), (("a",), ()), (("a", "a"), (1,)), (("a",), (1, 1))])
def test_wrong_requests_are_refused(tasks: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at least one|twice"):
        blocks(tasks, seeds)


def test_the_same_for_one_and_two_workers() -> None:
    loaders = [full_precision, quantized]
    results = [
        evaluate(loaders, TASKS, range(7), workers=workers, lanes=4, max_steps=30, factory=make_line)
        for workers in (0, 1, 2)
    ]
    assert results[0] == results[1] == results[2]
    reference, other = results[0]
    assert [(e.task, e.seed) for e in reference.episodes] == [(e.task, e.seed) for e in other.episodes]
    assert reference.episodes != other.episodes
    for rollouts in (reference, other):
        first: dict[tuple[str, bool], int] = {}
        for episode in rollouts.episodes:
            first.setdefault((episode.task, episode.success), episode.seed)
        assert {(strip.task, strip.success): strip.seed for strip in rollouts.strips} == first


def test_a_worker_s_failure_is_named() -> None:
    with pytest.raises(EvaluationError, match=r"policy number 1 failed on .*'broken' gave an action") as caught:
        evaluate([full_precision, broken], TASKS, range(2), workers=2, max_steps=30, factory=make_line)
    assert isinstance(caught.value.__cause__, ValueError)
