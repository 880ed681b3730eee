import numpy as np

from omega_qvla.policy import Observation
from tiny_policy import random_observations


def test_slices_and_concatenation_are_inverse() -> None:
    whole = random_observations(7, seed=0, image=8)
    again = Observation.concatenate([whole[:3], whole[3:4], whole[4:]])
    assert again.instructions == whole.instructions and len(again) == 7
    assert np.array_equal(again.state, whole.state)
    assert all(np.array_equal(again.images[camera], image) for camera, image in whole.images.items())


def test_a_slice_has_everything_of_its_observations() -> None:
    whole = random_observations(5, seed=0, image=8)
    part = whole[2:4]
    assert len(part) == 2 == len(part.state) == len(part.images["back"])
    assert np.array_equal(part.images["front"], whole.images["front"][2:4])
