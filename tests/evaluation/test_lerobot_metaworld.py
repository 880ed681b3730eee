"""Meta-World as lerobot shows it: lerobot's own environment, asked by our loop."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from line_world import Servo

# `importorskip` would import MuJoCo before our module has chosen its OpenGL backend.
if find_spec("metaworld") is None or find_spec("lerobot") is None:
    pytest.skip("needs Meta-World and lerobot", allow_module_level=True)

from omega_qvla import api
from omega_qvla.evaluation.metaworld import metaworld_mt10, metaworld_suite
from omega_qvla.evaluation.metaworld.lerobot_task import CAMERAS, IMAGE_SIZE, LerobotMetaWorldTask
from omega_qvla.evaluation.metaworld.task import TASKS
from omega_qvla.evaluation.rollout import EnvironmentPool, run_block
from omega_qvla.policy import Observation, PreviousChunk

MOVES = np.random.default_rng(0).uniform(-1, 1, (3, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def push() -> LerobotMetaWorldTask:
    return LerobotMetaWorldTask("push-v3")


def seen(task: LerobotMetaWorldTask, seed: int) -> list[np.ndarray]:
    """What an episode shows, its state and its images in turn."""
    task.reset(seed)
    found = [task.proprioception(), task.images()["image"]]
    for action in MOVES:
        assert not task.step(action)
        found += [task.proprioception(), task.images()["image"]]
    return found


def test_a_seed_names_an_initial_state_also_after_an_episode(push: LerobotMetaWorldTask) -> None:
    first = seen(push, 3)
    other = seen(push, 4)
    again, anew = seen(push, 3), seen(LerobotMetaWorldTask("push-v3"), 3)
    for one, two, three in zip(first, again, anew, strict=True):
        assert np.array_equal(one, two) and np.array_equal(one, three)
    assert first[1].shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and first[1].dtype == np.uint8
    assert not np.array_equal(first[1], other[1])


def test_it_is_what_lerobots_programs_show(push: LerobotMetaWorldTask) -> None:
    from lerobot.envs.configs import MetaworldEnv
    from lerobot.envs.utils import preprocess_observation

    from omega_qvla.lerobot_plugin.modeling_omega_qvla import _observation

    (robots,) = MetaworldEnv(task="push-v3").create_envs(1)["push-v3"].values()
    theirs, _ = robots.reset(seed=[5])
    ours = seen(push, 5)
    for step, action in enumerate([None, *MOVES]):
        if action is not None:
            theirs, *_ = robots.step(action[None])
        batch = preprocess_observation(theirs) | {"task": list(robots.call("task_description"))}
        observation = _observation(batch)
        assert observation.instructions == (push.instruction,)
        assert np.array_equal(observation.state[0], ours[2 * step])
        assert np.array_equal(observation.images["image"][0], ours[2 * step + 1])
    robots.close()


@pytest.mark.slow
def test_a_solved_episode_ends_and_still_shows_its_end() -> None:
    """lerobot begins the next episode in the same step."""
    task = LerobotMetaWorldTask("drawer-close-v3")
    task.reset(0)
    assert task._env is not None
    simulated, expert = task._env._env, task._env.expert_policy
    start, solved, steps = task.proprioception(), False, 0
    while not solved and steps < 120:
        solved = task.step(expert.get_action(simulated._get_obs()).astype(np.float32))
        steps += 1
    assert solved
    again = LerobotMetaWorldTask("drawer-close-v3")
    again.reset(0)
    assert np.array_equal(again.proprioception(), start)
    assert np.linalg.norm(task.proprioception()[:3] - start[:3]) > 0.1
    assert (task.images()["image"] != again.images()["image"]).mean() > 0.01
    task.close()


def test_suites() -> None:
    sizes = {"easy": 28, "medium": 11, "hard": 6, "very_hard": 5, "mt10": 10, "mt50": 50}
    suites = {name: metaworld_suite(name, "lerobot") for name in sizes}
    assert {name: len(suite.tasks) for name, suite in suites.items()} == sizes
    by_difficulty = [task for name in list(sizes)[:4] for task in suites[name].tasks]
    assert sorted(by_difficulty) == sorted(suites["mt50"].tasks)
    assert suites["mt10"].tasks == TASKS and suites["mt10"].max_steps == 500
    assert suites["easy"].name == "Meta-World easy" and suites["easy"].conditions["profile"] == "lerobot"
    assert api.benchmark_named() == metaworld_mt10() == metaworld_suite("mt10", "omega-qvla")


@pytest.mark.parametrize(
    ("suite", "profile", "message"),
    [
        ("easy", None, r"mt10 without it: choose one with --suite \(found easy\)"),
        (None, "lerobot", "suites are easy, medium, hard, very_hard, mt10, mt50 with --profile lerobot"),
        ("goal", "lerobot", r"found goal\); for LIBERO's add --env libero"),
        (None, "openpi", r"profiles are omega-qvla and lerobot \(found openpi\); for LIBERO's add --env libero"),
    ],
)
def test_what_does_not_fit_is_refused(suite: str | None, profile: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        api.benchmark_named("metaworld", suite, profile)


def test_unknown_tasks_and_other_robots_actions_are_refused(push: LerobotMetaWorldTask) -> None:
    with pytest.raises(ValueError, match="unknown Meta-World task 'juggle'; lerobot has assembly-v3, "):
        LerobotMetaWorldTask("juggle")
    push.reset(0)
    with pytest.raises(ValueError, match="actions have 7 dimensions, Meta-World's robot 4"):
        push.step(np.zeros(7, np.float32))


def test_one_episode() -> None:
    class Hand(Servo):
        def infer(self, observation: Observation, noise: object, previous: PreviousChunk | None = None) -> np.ndarray:
            assert tuple(observation.images) == CAMERAS and observation.state.shape == (1, 4)
            assert observation.instructions == ("Hammer a screw on the wall",)
            return np.zeros((1, 4, 4), np.float32)

    benchmark = metaworld_suite("medium", "lerobot")
    pool = EnvironmentPool(benchmark.factory)
    episode = run_block(Hand(), [("hammer-v3", 0)], pool, lanes=1, max_steps=3)[0]
    pool.close()
    assert (episode.task, episode.seed, episode.success, episode.steps) == ("hammer-v3", 0, False, 3)
