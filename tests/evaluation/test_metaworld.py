"""The simulator itself: initial states, cameras, and one real episode."""

from importlib.util import find_spec

import numpy as np
import pytest
from line_world import Servo

# `importorskip` would import MuJoCo before our module has chosen its OpenGL backend.
if find_spec("metaworld") is None:
    pytest.skip("needs Meta-World", allow_module_level=True)

from omega_qvla.evaluation.metaworld.suite import metaworld_environment
from omega_qvla.evaluation.metaworld.task import CAMERAS, IMAGE_SIZE, MetaWorldTask
from omega_qvla.evaluation.rollout import EnvironmentPool, run_block


@pytest.fixture(scope="module")
def push() -> MetaWorldTask:
    return MetaWorldTask("push-v3")


def test_a_seed_names_an_initial_state_also_after_an_episode(push: MetaWorldTask) -> None:
    push.reset(3)
    first, hand = push.images(), push.privileged
    for _ in range(5):
        push.step(np.array([1.0, 1.0, -1.0, 1.0]))
    moved = push.images()
    push.reset(4)
    other = push.privileged
    push.reset(3)
    np.testing.assert_array_equal(push.privileged, hand)
    assert not np.array_equal(other, hand)
    for name, image in push.images().items():
        np.testing.assert_array_equal(image, first[name])
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype == np.uint8
        assert not np.array_equal(image, moved[name])


@pytest.mark.parametrize("camera", CAMERAS)
def test_projection_agrees_with_the_image(push: MetaWorldTask, camera: str) -> None:
    """The goal, a small green ball, is drawn where `project` says."""
    push.reset(11)
    red, green, blue = np.moveaxis(push.images()[camera].astype(int), -1, 0)
    rows, columns = np.nonzero((green > 90) & (green > 3 * red) & (green > 3 * blue))
    drawn = (np.array([columns.mean(), rows.mean()]) + 0.5) / IMAGE_SIZE
    np.testing.assert_allclose(CAMERAS[camera].project(push.privileged[36:39]), drawn, atol=0.015)


def test_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown Meta-World task 'juggle'"):
        MetaWorldTask("juggle")


def test_one_episode() -> None:
    class Hand(Servo):
        def infer(self, observation, noise):  # type: ignore[no-untyped-def]
            assert list(observation.images) == list(CAMERAS) and observation.state.shape == (1, 4)
            return np.zeros((1, 4, 4), np.float32)

    pool = EnvironmentPool(metaworld_environment)
    episode = run_block(Hand(), [("reach-v3", 0)], pool, lanes=1, max_steps=3)[0]
    pool.close()
    assert (episode.task, episode.seed, episode.success, episode.steps) == ("reach-v3", 0, False, 3)
