"""Rollouts of several policies, spread over worker processes or machines.

A job is one policy on one block of episodes. Blocks follow from the request alone, never from the number of
workers, so neither do the results.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from omega_qvla.evaluation.recording import FirstStrips, FrameRecorder, FrameStrip
from omega_qvla.evaluation.rollout import (
    LANES,
    EnvironmentFactory,
    EnvironmentPool,
    Episode,
    run_block,
)
from omega_qvla.evaluation.workers import Workers, in_parallel, runs_here
from omega_qvla.policy import Policy

BLOCK_EPISODES = 16

Loader = Callable[[], Policy]
"""Opens a policy; picklable (a module-level function or `functools.partial` of one) for worker processes."""


class EvaluationError(RuntimeError):
    """A block of episodes failed; the cause is the worker's exception."""


@dataclass(frozen=True)
class RolloutSettings:
    """What every job shares."""

    lanes: int
    max_steps: int
    factory: EnvironmentFactory


@dataclass(frozen=True)
class Rollouts:
    """All episodes of one policy, in the order of the request, and frame strips of the first success and the first
    failure of each task."""

    episodes: tuple[Episode, ...]
    strips: tuple[FrameStrip, ...]


@dataclass(frozen=True)
class _Job:
    policy: int
    block: int
    episodes: tuple[tuple[str, int], ...]


def blocks(
    tasks: Sequence[str], seeds: Sequence[int], size: int = BLOCK_EPISODES
) -> list[tuple[tuple[str, int], ...]]:
    """Every task with every seed, cut into blocks that mix the tasks.

    Raises `ValueError` for no tasks, no seeds, or one that is listed twice.
    """
    if not tasks or not seeds:
        raise ValueError("an evaluation needs at least one task and one seed")
    if len(set(tasks)) != len(tasks) or len(set(seeds)) != len(seeds):
        raise ValueError("a task or a seed is listed twice")
    episodes = [(task, seed) for seed in seeds for task in tasks]
    return [tuple(episodes[start : start + size]) for start in range(0, len(episodes), size)]


def evaluate(
    loaders: Sequence[Loader],
    tasks: Sequence[str],
    seeds: Sequence[int],
    *,
    max_steps: int,
    factory: EnvironmentFactory,
    workers: Workers = 1,
    lanes: int = LANES,
) -> list[Rollouts]:
    """Roll every policy out on the same episodes, the reference first; one result per loader.

    With `workers` of 0 or 1 all runs in this process, with as many torch threads as the caller has set.
    Otherwise each worker process has one thread, loads a policy at its first job and keeps it, so memory
    holds as many copies of every policy. Raises `EvaluationError` naming the policy and the block if a job
    fails in a worker process; in this process the job's own exception comes through. Raises `RayClusterError`
    if `workers` is a cluster that is not there.
    """
    settings, cut = RolloutSettings(lanes, max_steps, factory), blocks(tasks, seeds)
    jobs = [_Job(policy, number, block) for number, block in enumerate(cut) for policy in range(len(loaders))]
    run = _run_here if runs_here(workers) else _run_elsewhere
    episodes: dict[tuple[int, int], tuple[Episode, ...]] = {}
    strips = [FirstStrips([episode for block in cut for episode in block]) for _ in loaders]
    total = sum(len(job.episodes) for job in jobs)
    with _progress(total) as advance, closing(run(loaders, settings, jobs, workers)) as finished:
        for job, rollouts in finished:
            episodes[job.policy, job.block] = rollouts.episodes
            for strip in rollouts.strips:
                strips[job.policy].offer(strip)
            advance(len(job.episodes))
    return [
        Rollouts(
            tuple(episode for block in range(len(cut)) for episode in episodes[policy, block]),
            tuple(strips[policy].strips()),
        )
        for policy in range(len(loaders))
    ]


class _Worker:
    """Runs jobs one after the other, keeping policies and environments."""

    def __init__(self, loaders: Sequence[Loader], settings: RolloutSettings) -> None:
        self.loaders, self.settings = loaders, settings
        self.policies: dict[int, Policy] = {}
        self.environments = EnvironmentPool(settings.factory)

    def run(self, job: _Job) -> Rollouts:
        if job.policy not in self.policies:
            self.policies[job.policy] = self.loaders[job.policy]()
        policy = self.policies[job.policy]
        recorder = FrameRecorder(policy.label, job.episodes)
        episodes = run_block(
            policy,
            job.episodes,
            self.environments,
            lanes=self.settings.lanes,
            max_steps=self.settings.max_steps,
            recorder=recorder,
        )
        return Rollouts(tuple(episodes), tuple(recorder.strips))


_process_worker: _Worker | None = None  # one per worker process, set by its initializer


def _start_process(loaders: Sequence[Loader], settings: RolloutSettings) -> None:
    global _process_worker
    _process_worker = _Worker(loaders, settings)


def _run_in_process(job: _Job) -> Rollouts:
    assert _process_worker is not None
    return _process_worker.run(job)


def _run_here(
    loaders: Sequence[Loader], settings: RolloutSettings, jobs: Sequence[_Job], workers: Workers
) -> Generator[tuple[_Job, Rollouts]]:
    worker = _Worker(loaders, settings)
    try:
        for job in jobs:
            yield job, worker.run(job)
    finally:
        worker.environments.close()


def _run_elsewhere(
    loaders: Sequence[Loader], settings: RolloutSettings, jobs: Sequence[_Job], workers: Workers
) -> Generator[tuple[_Job, Rollouts]]:
    with closing(in_parallel(_run_in_process, jobs, workers, _start_process, (loaders, settings))) as finished:
        for job, future in finished:
            yield job, _result(future, job)


def _result(future: Future[Rollouts], job: _Job) -> Rollouts:
    error = future.exception()
    if error is not None:
        raise EvaluationError(
            f"policy number {job.policy} failed on episodes {job.episodes[0]} to {job.episodes[-1]}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return future.result()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left on standard error; a line per block where that is not a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("episodes"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("episodes", total=total)

        def advance(count: int) -> None:
            progress.advance(bar, count)
            task = progress.tasks[bar]
            if not console.is_terminal:
                console.print(f"{task.completed:.0f} of {total} episodes, {task.elapsed or 0:.0f} s")

        yield advance
