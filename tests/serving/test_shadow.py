"""What shadow mode says is what the evaluation would say, and it never stands in the way."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from running import Declared, observation, running, settings, until

from omega_qvla.evaluation.fidelity import Predictions, action_fidelity
from omega_qvla.serving.metrics import Metrics
from omega_qvla.serving.shadow import Shadow, Tally


def test_the_figures_are_those_of_the_evaluation() -> None:
    generator = np.random.default_rng(0)
    wanted = (generator.normal(size=(6, 4, 3)) * [1, 100, 0] + [0, 1e4, 2]).astype(np.float32)
    actual = (wanted + generator.normal(size=wanted.shape) * 0.5).astype(np.float32)
    traces = np.zeros((1, 6, 4, 3), np.float32)
    fidelity = action_fidelity(Predictions(wanted, traces), Predictions(actual, traces), gripper=0)
    tally = Tally(3, gripper=0)
    for reference, actions in zip(wanted, actual, strict=True):
        tally.add(reference, actions)
    found = tally.differences()
    assert found.observations == 6 and found.gripper_flips == fidelity.gripper_flips > 0
    assert found.normalized_mse == pytest.approx(fidelity.normalized_mse, rel=1e-9)
    *varying, constant = fidelity.normalized_mse_per_dimension
    assert found.normalized_mse_per_dimension[:2] == pytest.approx(varying, rel=1e-9)
    assert found.normalized_mse_per_dimension[2] is constant is None
    np.testing.assert_allclose(found.maximum_error_per_dimension, np.abs(actual - wanted).max(axis=(0, 1)), rtol=1e-6)


def test_nothing_compared_is_no_figure(tmp_path: Path) -> None:
    shadow = Shadow(Declared(), Declared(label="omega-int4"))
    shadow.write(tmp_path / "shadow.json")
    written = json.loads((tmp_path / "shadow.json").read_text())
    assert written["observations"] == 0 and written["normalized_mse"] is None
    assert written["policy"] == "omega-int4" and written["reference"] == "full precision"


def test_the_same_observation_and_noise_are_compared() -> None:
    served, reference = Declared(gain=0.5), Declared()
    shadow = Shadow(reference, served)
    with running(served, settings(), shadow) as server:
        client = server.client()
        for shade in range(3):
            client.infer(observation(shade))
            until(lambda shade=shade: server.metric("shadow_compared_total") == shade + 1)
        errors = [server.metric(f'shadow_maximum_error{{dimension="{d}"}}') for d in (0, 1)]
    np.testing.assert_allclose(errors, [0.5, 0.25], rtol=1e-5)  # (1.5 - 0.5) · state; the noise cancels out
    assert [seen.images["back"][0, 0, 0, 0] for seen in reference.seen[1:]] == [0, 1, 2]
    with pytest.raises(AssertionError):
        until(lambda: any(thread.name == "shadow" for thread in threading.enumerate()), 0.1)


def test_a_slow_shadow_drops_and_does_not_delay() -> None:
    served, reference = Declared(), Declared()
    shadow = Shadow(reference, served)
    with running(served, settings(), shadow) as server:
        client = server.client()
        reference.gate.clear()
        for _ in range(8):
            assert client.infer(observation(0))["actions"].shape == (4, 2)
        assert server.metric("shadow_dropped_total") >= 3
        reference.gate.set()
        until(lambda: server.metric("shadow_compared_total") >= 4)


def test_a_failure_of_the_shadow_is_counted_and_not_served() -> None:
    served, reference = Declared(), Declared()

    def fail(*arguments: object) -> np.ndarray:
        raise RuntimeError("no")

    shadow = Shadow(reference, served)
    with running(served, settings(), shadow) as server:
        reference.infer = fail  # type: ignore[method-assign]
        assert server.ask().shape == (4, 2)
        until(lambda: server.metric("shadow_failed_total") == 1)


def test_another_robot_is_no_reference() -> None:
    other = Declared(noise_shape=(8, 3))
    with pytest.raises(ValueError, match="give --shadow the checkpoint that was quantized"):
        Shadow(other, Declared())


def test_its_metrics_are_registered_once() -> None:
    metrics, shadow = Metrics(), Shadow(Declared(), Declared())
    shadow.start(metrics)
    try:
        assert b"omega_qvla_shadow_compared_total 0.0" in metrics.text()
    finally:
        shadow.stop(5)
    assert asdict(Tally(2).differences())["normalized_mse_per_dimension"] == (None, None)
