"""One evaluation from policies to figures: action error, rollouts, latency and bytes in one call.

The reference runs in the same call as the policies compared with it, and what can fail soon runs first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import torch

from omega_qvla.evaluation.benchmark import Benchmark
from omega_qvla.evaluation.fidelity import Fidelity, action_fidelity, predict
from omega_qvla.evaluation.jobs import Loader, Rollouts, evaluate
from omega_qvla.evaluation.latency import Latency, measure_latency
from omega_qvla.evaluation.layer_error import LAYER_OBSERVATIONS, LayerError, has_layers, layer_errors
from omega_qvla.evaluation.recording import RecordedObservation, collect_observations, spread
from omega_qvla.evaluation.results import Evaluation, PolicyResult, describe_machine, manifest_digest, size_on_disk
from omega_qvla.evaluation.rollout import LANES
from omega_qvla.evaluation.traces import ActionTrace, extreme_traces
from omega_qvla.evaluation.workers import Workers, runs_here
from omega_qvla.policy import Policy, QuantizablePolicy

FIDELITY_OBSERVATIONS = 128
LATENCY_REPEATS = 20


@dataclass(frozen=True)
class Candidate:
    """A policy to evaluate: how to open it, and where it lies on disk if its bytes shall be counted."""

    load: Loader
    path: Path | None = None
    bytes_by_part: Mapping[str, int] | None = None
    """Of those bytes, what each part of the policy takes."""


@dataclass(frozen=True)
class _Card:
    """What is written down of a policy, so that it need not stay in memory during the rollouts."""

    label: str
    execution: str
    resident_bytes: int
    execute_steps: int
    noise_shape: tuple[int, int]
    fidelity: Fidelity | None
    layers: tuple[LayerError, ...]


def evaluate_policies(
    candidates: Sequence[Candidate],
    benchmark: Benchmark,
    *,
    tasks: Sequence[str] | None = None,
    episodes_per_task: int,
    first_seed: int | None = None,
    workers: Workers = 1,
    lanes: int = LANES,
    fidelity_observations: int = FIDELITY_OBSERVATIONS,
    fidelity_episodes_per_task: int = 1,
    latency_repeats: int = LATENCY_REPEATS,
) -> Evaluation:
    """Evaluate policies on the same episodes of a benchmark, of all its tasks or of these; the first candidate is the
    reference.

    Policies execute as many actions of a chunk as they say: their loaders have to heed `benchmark.execute_steps`.

    Held-out observations come from the reference's own rollouts at fidelity seeds. `fidelity_observations` or
    `latency_repeats` of 0 leaves that measurement out. Raises `ValueError` for no candidates, seeds outside
    the evaluation range, two policies with one label, or policies whose noise has different shapes;
    `FileNotFoundError` for a path that does not exist; `EvaluationError` if a worker process fails, `RayClusterError`
    if `workers` is a cluster that is not there.
    """
    if not candidates:
        raise ValueError("an evaluation needs at least one policy")
    names, seeds = benchmark.choose(tasks), benchmark.evaluation_seeds(episodes_per_task, first_seed)
    sizes = [None if candidate.path is None else size_on_disk(candidate.path) for candidate in candidates]
    held_out = benchmark.held_out_seeds(fidelity_episodes_per_task)
    episodes = [(task, seed) for task in names for seed in held_out]
    max_steps, factory = benchmark.max_steps, benchmark.factory
    # In one process every policy is opened once; beside workers none stays in memory during the rollouts.
    loaders = [cache(candidate.load) if runs_here(workers) else candidate.load for candidate in candidates]
    with one_thread():
        recorded: list[RecordedObservation] = []
        if fidelity_observations or latency_repeats:
            recorded = collect_observations(loaders[0](), episodes, benchmark, lanes=lanes)
        cards, traces = _describe(loaders, spread(recorded, fidelity_observations), benchmark)
        rollouts = evaluate(loaders, names, seeds, workers=workers, lanes=lanes, max_steps=max_steps, factory=factory)
    latencies = _latencies(loaders, recorded, latency_repeats)
    return Evaluation(
        machine=describe_machine(),
        tasks=tuple(names),
        seeds=tuple(seeds),
        max_steps=max_steps,
        lanes=lanes,
        policies=tuple(map(_result, candidates, cards, sizes, rollouts, latencies)),
        fidelity_seeds=tuple(held_out),
        strips=tuple(strip for rollout in rollouts for strip in rollout.strips),
        benchmark=benchmark.name,
        conditions=dict(benchmark.conditions),
        instructions={task: benchmark.tasks[task] for task in names},
        traces=traces,
    )


def _describe(
    loaders: Sequence[Loader], recorded: Sequence[RecordedObservation], benchmark: Benchmark
) -> tuple[list[_Card], tuple[ActionTrace, ...]]:
    """Open every policy once and compare its actions and its layers with the reference's, which is the first."""
    reference = loaders[0]()
    predictions = {reference.label: predict(reference, recorded)} if recorded else {}
    cards = [_card(reference, None, ())]
    for loader in loaders[1:]:
        policy = loader()
        _check_comparable(policy, cards)
        fidelity = None
        if recorded:
            predictions[policy.label] = predict(policy, recorded)
            gripper, threshold = benchmark.gripper, benchmark.gripper_threshold
            wanted, actual = predictions[reference.label], predictions[policy.label]
            fidelity = action_fidelity(wanted, actual, gripper, threshold)
        cards.append(_card(policy, fidelity, _layers(reference, policy, recorded)))
    actions = {label: found.actions for label, found in predictions.items()}
    return cards, extreme_traces(recorded, actions, reference.execute_steps)


def _card(policy: Policy, fidelity: Fidelity | None, layers: tuple[LayerError, ...]) -> _Card:
    resident, steps = policy.resident_bytes(), policy.execute_steps
    return _Card(policy.label, policy.execution, resident, steps, policy.noise_shape, fidelity, layers)


def _layers(reference: Policy, policy: Policy, recorded: Sequence[RecordedObservation]) -> tuple[LayerError, ...]:
    """Errors of quantized linears, if the reference is in full precision and both policies show their layers."""
    if reference.execution != "float" or not has_layers(reference) or not has_layers(policy):
        return ()
    shown = cast(QuantizablePolicy, reference), cast(QuantizablePolicy, policy)
    return layer_errors(*shown, spread(recorded, LAYER_OBSERVATIONS))


def _check_comparable(policy: Policy, cards: Sequence[_Card]) -> None:
    if policy.label in [card.label for card in cards]:
        raise ValueError(f"two policies are called {policy.label!r}")
    if cards and policy.noise_shape != cards[0].noise_shape:
        raise ValueError(
            f"{policy.label!r} starts from noise of shape {policy.noise_shape}, the reference from "
            f"{cards[0].noise_shape}: they cannot be run under the same noise"
        )


def _latencies(
    loaders: Sequence[Loader], recorded: Sequence[RecordedObservation], repeats: int
) -> Sequence[Latency | None]:
    if not repeats:
        return [None] * len(loaders)
    return measure_latency([loader() for loader in loaders], recorded[0], repeats=repeats)


def _result(
    candidate: Candidate, card: _Card, size: int | None, rollouts: Rollouts, latency: Latency | None
) -> PolicyResult:
    return PolicyResult(
        label=card.label,
        execution=card.execution,
        path=None if candidate.path is None else candidate.path.name,
        bytes_on_disk=size,
        resident_bytes=card.resident_bytes,
        execute_steps=card.execute_steps,
        episodes=rollouts.episodes,
        fidelity=card.fidelity,
        latency=latency,
        layers=card.layers,
        bytes_by_part=None if candidate.bytes_by_part is None else dict(candidate.bytes_by_part),
        manifest_sha256=None if candidate.path is None else manifest_digest(candidate.path),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in torch depend on the number of threads; workers have one, so this process takes one too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
