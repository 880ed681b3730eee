"""Action error by hand."""

import numpy as np
import pytest
from line_world import Broken, Servo, line_benchmark

from omega_qvla.evaluation.fidelity import Predictions, action_fidelity, predict
from omega_qvla.evaluation.latency import measure_latency
from omega_qvla.evaluation.recording import RecordedObservation, collect_observations


@pytest.fixture(scope="module")
def recorded() -> list[RecordedObservation]:
    episodes = [("slide", 600_000), ("lift", 600_000)]
    return collect_observations(Servo(), episodes, line_benchmark(), lanes=2)


def predictions(actions: np.ndarray) -> Predictions:
    return Predictions(actions, np.stack([0.5 * actions, actions]))


def test_definitions_by_hand() -> None:
    wanted = np.array([[[1.0, 0.0, 1.0], [-1.0, 0.0, -1.0]], [[3.0, 0.0, 1.0], [-3.0, 0.0, -1.0]]])
    actual = wanted + np.array([1.0, 0.5, 0.0])
    actual[0, 0, 2] = -1.0
    fidelity = action_fidelity(predictions(wanted), predictions(actual))
    assert fidelity.normalized_mse_per_dimension == (pytest.approx(4 / 20), None, pytest.approx(4 / 4))
    assert fidelity.normalized_mse == pytest.approx((0.2 + 1.0) / 2)
    assert fidelity.mse == pytest.approx((4 + 4 * 0.25 + 4) / 12)
    assert fidelity.gripper_flips == pytest.approx(1 / 4)
    total = (4 + 1 + 4) / 24
    assert fidelity.normalized_mse_per_step == (pytest.approx(total), pytest.approx(total))
    assert fidelity.absolute_error_p50 == pytest.approx(0.5)
    assert fidelity.observations == 2


def test_a_wrong_scale_shows_although_the_cosine_is_one() -> None:
    wanted = np.random.default_rng(0).standard_normal((6, 3, 2))
    fidelity = action_fidelity(predictions(wanted), predictions(2 * wanted))
    assert fidelity.cosine == pytest.approx(1)
    assert fidelity.normalized_mse > 0.9


def test_the_reference_equals_itself(recorded: list[RecordedObservation]) -> None:
    answers = predict(Servo(), recorded)
    fidelity = action_fidelity(answers, predict(Servo(), recorded))
    assert (fidelity.normalized_mse, fidelity.mse, fidelity.gripper_flips) == (0, 0, 0)
    assert fidelity.cosine == pytest.approx(1)
    assert fidelity.normalized_mse_per_step == (0, 0, 0)  # the padded dimension of the trace is left out


def test_answers_do_not_depend_on_the_batch(recorded: list[RecordedObservation]) -> None:
    one, many = predict(Servo(), recorded, batch=1), predict(Servo(), recorded, batch=5)
    np.testing.assert_array_equal(one.actions, many.actions)
    np.testing.assert_array_equal(one.traces, many.traces)
    assert one.traces.shape == (3, len(recorded), 4, 3)


def test_bad_input_is_refused(recorded: list[RecordedObservation]) -> None:
    actions = np.random.default_rng(0).standard_normal((6, 3, 2))
    with pytest.raises(ValueError, match="actions have shape"):
        action_fidelity(predictions(actions), predictions(actions[:5]))
    with pytest.raises(ValueError, match="do not vary"):
        action_fidelity(predictions(np.ones((6, 3, 2))), predictions(actions))
    with pytest.raises(ValueError, match="no observations"):
        predict(Servo(), [])
    with pytest.raises(ValueError, match="'broken' gave an action that is not finite"):
        predict(Broken(label="broken"), recorded, batch=2)


def test_latency_runs_the_policies_in_turn(recorded: list[RecordedObservation]) -> None:
    calls: list[str] = []

    class Watched(Servo):
        def infer(self, observation, noise):  # type: ignore[no-untyped-def]
            calls.append(self.label)
            return super().infer(observation, noise)

    first, second = measure_latency([Watched("a"), Watched("b")], recorded[0], repeats=4, warm_up=2)
    assert calls == ["a", "b"] * 6
    assert first.repeats == second.repeats == 4
    assert 0 < first.minimum_ms <= first.p50_ms <= first.p95_ms <= first.maximum_ms
    with pytest.raises(ValueError, match="at least one repeat"):
        measure_latency([], recorded[0], repeats=0)
