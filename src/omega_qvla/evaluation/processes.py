"""Worker processes that do independent jobs."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

import torch


def in_processes[Job, Result](
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    initializer: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Generator[tuple[Job, Future[Result]]]:
    """Each job with its future, as they finish; torch has one thread in every process.

    `function`, the jobs and `initializer`, which is called with `arguments` when a process starts, are imported or
    pickled there. When the generator is closed early, processes are ended in the middle of their jobs.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (initializer, arguments))
    finished = False
    try:
        futures = {pool.submit(function, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future
        finished = True
    finally:
        if not finished:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        pool.shutdown(wait=finished, cancel_futures=True)


def _start(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process instead of failing its job
    torch.set_num_threads(1)
    if initializer is not None:
        initializer(*arguments)
