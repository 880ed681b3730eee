"""Where independent jobs run: in worker processes of this machine, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any

from omega_qvla.evaluation.processes import in_processes
from omega_qvla.evaluation.ray_cluster import RayCluster, on_ray

Workers = int | RayCluster
"""A number of processes on this machine, of which 0 and 1 mean this process, or a cluster."""


def runs_here(workers: Workers) -> bool:
    """Whether jobs run in this process."""
    return not isinstance(workers, RayCluster) and workers <= 1


def in_parallel[Job, Result](
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: Workers,
    initializer: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Generator[tuple[Job, Future[Result]]]:
    """Each job with its future, as they finish; torch has one thread in every process.

    `function`, the jobs and `initializer`, which is called with `arguments` once in every process before its first
    job, are imported or pickled there. When the generator is closed early, processes are ended in the middle of
    their jobs. Raises `RayClusterError` if there is no such cluster.
    """
    if isinstance(workers, RayCluster):
        return on_ray(function, jobs, workers, initializer, arguments)
    return in_processes(function, jobs, workers, initializer, arguments)
