"""Independent jobs on a Ray cluster, which may lose processes and machines meanwhile.

A job is a function of its description alone, so a job that is lost with its worker is run again elsewhere, and a
finished one is not: its result is here. Machines must have this one's processor and package versions, because
sums depend on them. Ray pickles between its processes, and whoever reaches its ports runs code: keep them closed.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from omega_qvla.evaluation.results import describe_machine

RETRIES = 4
"""Times that a job is run again after its worker died; one that kills every worker is an error in the end."""
_OBJECT_STORE_BYTES = 256 * 2**20
"""Of a cluster on this machine: results of jobs are small and are fetched as they come."""

_REACH_SECONDS = 10.0
_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on the loopback device; read when Ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray reports to its makers unless told not to
    "RAY_worker_niceness": "0",  # Ray's workers give way to everything else on the machine unless told not to
}


class RayClusterError(RuntimeError):
    """A cluster that is not there, does not fit, or lost a job for good; the message says what to do."""


@dataclass(frozen=True)
class RayCluster:
    """Where Ray runs."""

    address: str
    """`auto`, the cluster that this machine is part of; HOST:PORT of a head; `local`, one for this call alone."""
    at_a_time: int | None = None
    """Jobs at a time, each on one CPU; None: as many as there are CPUs."""


def on_ray[Job, Result](
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    cluster: RayCluster,
    initializer: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Generator[tuple[Job, Future[Result]]]:
    """See `omega_qvla.evaluation.workers.in_parallel`.

    Raises `RayClusterError` if Ray is not installed or there is no such cluster. A job whose worker died more than
    RETRIES times, or ran on a machine that does not fit, has it as the exception of its future.
    """
    with connected(cluster) as ray:
        run_on_worker = ray.remote(num_cpus=1, max_retries=RETRIES)(_run)
        shared = [ray.put((function, initializer, arguments))]  # in a list it is read by `_run`, not before
        run, wanted = uuid.uuid4().hex, _circumstances()
        waiting, running = list(reversed(jobs)), dict[Any, Job]()
        try:
            while waiting or running:
                while waiting and len(running) < (cluster.at_a_time or len(jobs)):
                    job = waiting.pop()
                    running[run_on_worker.remote(run, wanted, shared, job)] = job
                for finished in ray.wait(list(running))[0]:
                    yield running.pop(finished), _future(ray, finished)
        finally:
            for unfinished in running:
                ray.cancel(unfinished, force=True)


_initialized: str | None = None  # in a worker process: the call of `on_ray` for which it was


def _run(run: str, wanted: dict[str, str], shared: list[Any], job: Any) -> Any:
    """In a worker process, which Ray keeps for several jobs."""
    global _initialized
    if _initialized != run:
        _check_circumstances(wanted)
    function, initializer, arguments = import_module("ray").get(shared[0])
    if _initialized != run:
        torch.set_num_threads(1)
        if initializer is not None:
            initializer(*arguments)
        _initialized = run
    return function(job)


@cache
def _circumstances() -> dict[str, str]:
    """What results depend on besides the job."""
    machine = describe_machine()
    return {"Python": machine.python, "processor": machine.cpu, **machine.packages}


def _check_circumstances(wanted: dict[str, str]) -> None:
    found = _circumstances()
    for name, value in wanted.items():
        if found.get(name) != value:
            raise RayClusterError(
                f"machine {platform.node()} of the Ray cluster has {name} {found.get(name)}, the one that asks "
                f"has {value}: results could differ; install the same there, or take the machine out of the cluster"
            )


def _future(ray: ModuleType, reference: Any) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(ray.get(reference))
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
        future.set_exception(RayClusterError(f"its worker died {RETRIES + 1} times ({type(error).__name__})"))
    except ray.exceptions.RayTaskError as error:
        future.set_exception(_one_sentence(ray, error.cause))
    except ray.exceptions.RayError as error:
        future.set_exception(_one_sentence(ray, error))
    return future


def _one_sentence(ray: ModuleType, error: Exception) -> Exception:
    """The job's own exception as it is; one of Ray's without its tracebacks."""
    if not isinstance(error, ray.exceptions.RayError):
        return error
    first = str(error).partition("\n")[0]
    return RayClusterError(f"Ray could not run it ({type(error).__name__}: {first})")


@contextmanager
def connected(cluster: RayCluster) -> Iterator[ModuleType]:
    """While open, this process is connected; gives the library.

    A connection that there is already is used and kept, so that several calls can share one. Raises
    `RayClusterError` if Ray is not installed or there is no such cluster.
    """
    try:
        _reach(cluster.address)
        ray = _import_ray(_LOCAL_ENVIRONMENT if cluster.address == "local" else {})
        if ours := not ray.is_initialized():
            _start_or_join(ray, cluster)
    except RayClusterError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise RayClusterError(
            f"there is no Ray cluster at {cluster.address!r} ({error}); start one with `ray start --head`, or use "
            "'local' for one of this machine's processes"
        ) from error
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _start_or_join(ray: ModuleType, cluster: RayCluster) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if cluster.address != "local":
        ray.init(cluster.address, **options)
        return
    options |= {"num_cpus": cluster.at_a_time, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    # Its processes import what this one does.
    with _environment({"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **_LOCAL_ENVIRONMENT}):
        ray.init("local", **options)


def _reach(address: str) -> None:
    """Raise `OSError` if nothing answers at HOST:PORT: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        with socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS):
            pass


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """While open, processes that are started have these variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _import_ray(variables: Mapping[str, str]) -> ModuleType:
    try:
        with _environment(variables):
            return import_module("ray")
    except ImportError as error:
        raise RayClusterError(f"Ray needs `pip install 'omega-qvla[ray]'`: {error}") from error
