"""Traces of actions along held-out episodes."""

from __future__ import annotations

import numpy as np
from line_world import TASKS, Servo, line_benchmark

from omega_qvla.evaluation.fidelity import predict
from omega_qvla.evaluation.recording import collect_observations
from omega_qvla.evaluation.traces import extreme_traces

RECORDED = collect_observations(
    Servo(), [(task, 7) for task in TASKS], line_benchmark(record_actions=2 * Servo().execute_steps), lanes=2
)


def test_the_extremes_are_the_episodes_of_largest_and_smallest_deviation() -> None:
    policies = {"reference": Servo(), "a": Servo(gain=1.4), "b": Servo(gain=0.9)}
    actions = {label: predict(policy, RECORDED).actions for label, policy in policies.items()}
    first, last = extreme_traces(RECORDED, actions, execute_steps=2)

    variance = actions["reference"][:, :2].reshape(-1, 2).var(axis=0)
    deviation = {}
    for task in TASKS:
        rows = [place for place, item in enumerate(RECORDED) if item.task == task]
        errors = [(actions[label] - actions["reference"])[rows, :2] ** 2 for label in ("a", "b")]
        deviation[task] = float(np.mean(np.mean(errors, axis=(0, 1, 2)) / variance))
    assert first.task == max(deviation, key=deviation.__getitem__)
    assert last.task == min(deviation, key=deviation.__getitem__)
    np.testing.assert_allclose(first.deviation, deviation[first.task], rtol=1e-3)

    rows = [place for place, item in enumerate(RECORDED) if item.task == first.task]
    assert first.starts == tuple(2 * RECORDED[place].inference for place in rows)
    assert list(first.actions) == list(policies)
    for label in policies:
        np.testing.assert_allclose(first.actions[label], actions[label][rows, :2], rtol=1e-4)


def test_nothing_to_compare() -> None:
    actions = predict(Servo(), RECORDED).actions
    assert extreme_traces(RECORDED, {"reference": actions}, execute_steps=2) == ()
    one = [item for item in RECORDED if item.task == TASKS[0]]
    pair = {"reference": actions[: len(one)], "a": actions[: len(one)]}
    (only,) = extreme_traces(one, pair, execute_steps=2)
    assert only.deviation == 0
