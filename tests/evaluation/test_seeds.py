"""Seed ranges and noise."""

import numpy as np
import pytest

from omega_qvla.evaluation import seeds


def test_ranges_are_disjoint() -> None:
    seeds.check_disjoint(
        {
            "evaluation": seeds.EVALUATION_SEEDS,
            "calibration": seeds.CALIBRATION_SEEDS,
            "fidelity": seeds.FIDELITY_SEEDS,
            "training": seeds.TRAINING_SEEDS,
        }
    )


@pytest.mark.parametrize("second", [range(9, 20), [30, 9], range(1, 20, 2)])
def test_shared_seed_is_named(second: range | list[int]) -> None:
    with pytest.raises(ValueError, match=r"seed [19] is used for both evaluation and training"):
        seeds.check_disjoint({"evaluation": range(10), "calibration": range(50, 60), "training": second})


def test_seed_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="seed 100000 is not an evaluation seed"):
        seeds.check_within(range(99_999, 100_001), seeds.EVALUATION_SEEDS, "evaluation")


def test_noise_depends_on_task_seed_and_inference_only() -> None:
    noise = seeds.episode_noise("push-v3", 7, 2, (5, 3))
    assert noise.shape == (5, 3) and noise.dtype == np.float32
    np.testing.assert_array_equal(noise, seeds.episode_noise("push-v3", 7, 2, (5, 3)))
    for other in (("reach-v3", 7, 2), ("push-v3", 8, 2), ("push-v3", 7, 3)):
        assert not np.array_equal(noise, seeds.episode_noise(*other, (5, 3)))


def test_noise_is_the_same_for_ever() -> None:
    # Published figures depend on it.
    np.testing.assert_allclose(seeds.episode_noise("push-v3", 7, 2, (1, 3))[0], GOLDEN_NOISE, rtol=1e-6)


GOLDEN_NOISE = [0.3990304, -1.514251, 1.1066854]
