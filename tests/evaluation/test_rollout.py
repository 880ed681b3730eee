"""The loop of lanes: pairing, refilling, padding, recording."""

import base64
import io
import random

import numpy as np
import pytest
from line_world import NOISE_SHAPE, TASKS, Broken, Line, Servo, line_benchmark, make_line
from PIL import Image

from omega_qvla.evaluation.recording import STRIP_FRAMES, FrameRecorder, collect_observations, spread
from omega_qvla.evaluation.rollout import EnvironmentPool, Episode, run_block
from omega_qvla.evaluation.seeds import episode_noise

EPISODES = [(task, seed) for seed in range(5) for task in TASKS]


def run(policy: Servo, episodes: list[tuple[str, int]] = EPISODES, lanes: int = 4) -> list[Episode]:
    return run_block(policy, episodes, EnvironmentPool(make_line), lanes=lanes, max_steps=30)


def test_episodes_come_back_in_the_order_of_the_list() -> None:
    ended = run(Servo())
    assert [(episode.task, episode.seed) for episode in ended] == EPISODES
    assert {episode.success for episode in ended} == {True, False}  # a fair test of the loop needs both
    assert all(episode.steps == 30 or episode.success for episode in ended)


@pytest.mark.parametrize("lanes", [1, 2, 7, 16, 40])
def test_results_do_not_depend_on_lanes(lanes: int) -> None:
    assert run(Servo(), lanes=lanes) == run(Servo(), lanes=4)


def test_results_do_not_depend_on_order() -> None:
    shuffled = random.Random(0).sample(EPISODES, len(EPISODES))
    key = lambda episode: (episode.task, episode.seed)  # noqa: E731
    assert sorted(run(Servo(), shuffled), key=key) == sorted(run(Servo()), key=key)


def test_batch_size_never_changes() -> None:
    policy = Servo()
    run(policy, lanes=6)
    assert set(policy.batches) == {6}


def test_policies_meet_the_same_noise() -> None:
    first, second = Servo(), Servo(label="other", gain=0.1)
    run(first), run(second)
    for policy in (first, second):
        for lane, (task, seed) in enumerate(EPISODES[:4]):
            np.testing.assert_array_equal(policy.seen_noise[0][lane], episode_noise(task, seed, 0, NOISE_SHAPE))


def test_an_episode_stops_at_its_first_success_within_a_chunk() -> None:
    policy = Servo(gain=0.0, shake=0.0, execute_steps=4)

    class SolvedAtThirdStep(Line):
        def reset(self, seed: int) -> None:
            self.count = 0

        def step(self, action: np.ndarray) -> bool:
            self.count += 1
            assert self.count <= 3
            return self.count == 3

    pool = EnvironmentPool(SolvedAtThirdStep)
    assert run_block(policy, [("slide", 0)], pool, lanes=2, max_steps=30) == [Episode("slide", 0, True, 3)]


def test_step_limit_that_is_no_multiple_of_the_chunk() -> None:
    policy = Servo(gain=0.0, shake=0.0, execute_steps=4)
    ended = run_block(policy, [("lift", 0)], EnvironmentPool(make_line), lanes=2, max_steps=7)
    assert ended == [Episode("lift", 0, False, 7)]


def test_environments_are_reused() -> None:
    made = []

    def factory(task: str) -> Line:
        made.append(Line(task))
        return made[-1]

    pool = EnvironmentPool(factory)
    run_block(Servo(), EPISODES, pool, lanes=2, max_steps=30)
    assert len(made) <= 2 * len(TASKS)
    pool.close()
    assert all(line.closed for line in made)


def test_nan_is_refused_with_its_place() -> None:
    policy = Broken(label="broken", gain=0.0, shake=0.0)
    with pytest.raises(ValueError, match=r"'broken' gave an action that is not finite: task turn, seed 0, step 5"):
        run(policy)


@pytest.mark.parametrize(
    ("episodes", "lanes", "execute_steps", "message"),
    [
        ([("slide", 0), ("slide", 0)], 2, 2, "listed twice"),
        ([("slide", 0)], 0, 2, "at least 1"),
        ([("slide", 0)], 2, 5, "executes 5 actions of a chunk of 4"),
    ],
)
def test_wrong_requests_are_refused(
    episodes: list[tuple[str, int]], lanes: int, execute_steps: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(Servo(execute_steps=execute_steps), episodes, lanes)


def test_recorded_observations_are_ordered_and_every_second() -> None:
    episodes = [("turn", 3), ("slide", 1), ("lift", 2)]
    benchmark = line_benchmark(record_actions=2 * Servo().execute_steps)
    recorded = collect_observations(Servo(), episodes, benchmark, lanes=2)
    found = [(item.task, item.seed) for item in recorded]
    assert list(dict.fromkeys(found)) == episodes
    assert all(item.inference % 2 == 0 and len(item.observation) == 1 for item in recorded)
    first = Line("turn")
    first.reset(3)
    np.testing.assert_array_equal(recorded[0].observation.state[0], first.proprioception())
    assert recorded[0].noise(NOISE_SHAPE).shape == (1, *NOISE_SHAPE)


def test_spread_keeps_first_and_last() -> None:
    recorded = collect_observations(Servo(), [("lift", 0)], line_benchmark(), lanes=1)
    chosen = spread(recorded, 4)
    assert len(chosen) == 4 and chosen[0] is recorded[0] and chosen[-1] is recorded[-1]
    assert spread(recorded, 1000) == recorded


@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_frame_strips_of_the_first_success_and_the_first_failure(lanes: int) -> None:
    recorder = FrameRecorder("p", EPISODES)
    ended = run_block(Servo(), EPISODES, EnvironmentPool(make_line), lanes=lanes, max_steps=30, recorder=recorder)
    first: dict[tuple[str, bool], int] = {}
    for episode in ended:
        first.setdefault((episode.task, episode.success), episode.seed)
    assert {success for _, success in first} == {True, False}
    assert {(strip.task, strip.success): strip.seed for strip in recorder.strips} == first
    places = [EPISODES.index((strip.task, strip.seed)) for strip in recorder.strips]
    assert places == sorted(places)


def test_a_long_episode_keeps_few_frames_of_its_whole_length() -> None:
    policy = Servo(gain=0.0, shake=0.0, execute_steps=1)

    class Counting(Line):
        def reset(self, seed: int) -> None:
            self.count = 0

        def step(self, action: np.ndarray) -> bool:
            self.count += 1
            return False

        def images(self) -> dict[str, np.ndarray]:
            return {"back": np.full((8, 8, 3), self.count // 4, np.uint8)}

    recorder = FrameRecorder("p", [("lift", 0)])
    run_block(policy, [("lift", 0)], EnvironmentPool(Counting), lanes=1, max_steps=1000, recorder=recorder)
    jpeg = Image.open(io.BytesIO(base64.b64decode(recorder.strips[0].jpeg)))
    shades = np.asarray(jpeg)[4, 4::8, 0].astype(int)
    assert len(shades) == STRIP_FRAMES
    np.testing.assert_allclose(np.diff(shades), 250 / (STRIP_FRAMES - 1), atol=8)
