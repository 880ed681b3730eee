"""Blocks on a Ray cluster of several processes, of which some are lost."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from line_world import TASKS, broken, fatal, full_precision, line_benchmark, make_line, make_noting, slow

from omega_qvla.cli.shared import workers_of
from omega_qvla.evaluation import jobs, ray_cluster, results
from omega_qvla.evaluation.jobs import BLOCK_EPISODES, EvaluationError
from omega_qvla.evaluation.ray_cluster import RayCluster, RayClusterError
from omega_qvla.evaluation.run import Candidate, evaluate_policies
from omega_qvla.evaluation.workers import Workers

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
EPISODES_PER_TASK = 16


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Two processes, and Ray's own."""
    chosen = RayCluster("local", at_a_time=2)
    with ray_cluster.connected(chosen):
        yield chosen


def evaluate(workers: Workers, notes: Path) -> dict[str, Any]:
    """The result file, without the time at which it was made."""
    notes.mkdir()
    evaluation = evaluate_policies(
        [Candidate(full_precision), Candidate(slow)],
        line_benchmark(partial(make_noting, notes)),
        episodes_per_task=EPISODES_PER_TASK,
        workers=workers,
        lanes=4,
        latency_repeats=0,
    )
    document = json.loads(results.to_json(evaluation))
    assert document["machine"].pop("created")
    return document


def started(notes: Path) -> Counter[str]:
    """How often each episode was started by other processes than this one."""
    return Counter(line for file in others(notes) for line in file.read_text().splitlines())


def others(notes: Path) -> list[Path]:
    """Their notes, the latest first."""
    files = [file for file in notes.iterdir() if file.name != str(os.getpid())]
    return sorted(files, key=lambda file: -file.stat().st_mtime)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def test_no_cluster_is_a_sentence() -> None:
    with pytest.raises(RayClusterError, match=r"no Ray cluster at '127\.0\.0\.1:1' .*`ray start --head`"):
        next(ray_cluster.on_ray(str, [1], RayCluster("127.0.0.1:1")))


@needs_ray
@pytest.mark.slow
def test_two_workers_killed_midway_change_nothing(cluster: RayCluster, tmp_path: Path) -> None:
    notes, killed = tmp_path / "cluster", []

    def kill() -> None:
        for episodes in (BLOCK_EPISODES + 4, 3 * BLOCK_EPISODES + 4):  # in the middle of the second and fourth block
            wait_until(lambda episodes=episodes: notes.exists() and started(notes).total() >= episodes)
            killed.append(int(others(notes)[0].name))
            os.kill(killed[-1], signal.SIGKILL)

    killer = Thread(target=kill, daemon=True)
    killer.start()
    on_cluster = evaluate(cluster, notes)
    killer.join(10)
    assert len(set(killed)) == 2
    assert on_cluster == evaluate(1, tmp_path / "here")

    runs = started(notes)
    total = 2 * EPISODES_PER_TASK * len(TASKS)
    assert len(runs) == total / 2 and min(runs.values()) == 2
    assert 0 < runs.total() - total <= 2 * BLOCK_EPISODES  # at most the two blocks that were lost ran again


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_cluster_of_this_machine_listens_to_this_machine_alone() -> None:
    processes = psutil.Process().children(recursive=True)
    listening = [c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


@needs_ray
@pytest.mark.slow
def test_failures_on_the_cluster_are_named(cluster: RayCluster) -> None:
    with pytest.raises(EvaluationError, match=r"policy number 1 failed on .*'broken' gave an action") as caught:
        jobs.evaluate(
            [full_precision, broken],
            TASKS,
            range(1),
            workers=cluster,
            max_steps=30,
            factory=make_line,
        )
    assert isinstance(caught.value.__cause__, ValueError)


@needs_ray
@pytest.mark.slow
def test_a_block_that_kills_its_workers_is_named(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "RETRIES", 1)
    with pytest.raises(EvaluationError, match=r"policy number 0 failed on .*its worker died 2 times \(WorkerCrashed"):
        jobs.evaluate([fatal], TASKS, range(1), workers=cluster, max_steps=30, factory=make_line)


@needs_ray
@pytest.mark.slow
def test_what_a_worker_lacks_is_one_sentence(cluster: RayCluster) -> None:
    ((_, future),) = ray_cluster.on_ray(lacking, [1], cluster)
    with pytest.raises(RayClusterError, match=r"^Ray could not run it \(RaySystemError: .*\)$"):
        future.result()


def lacking(job: int) -> int:
    """Of this module, which workers cannot import."""
    return job


def test_what_the_options_say() -> None:
    assert workers_of(None, "") == 2 and workers_of(5, "") == 5
    assert workers_of(None, "auto") == RayCluster("auto") and workers_of(3, "a:1") == RayCluster("a:1", at_a_time=3)


def test_a_machine_that_does_not_fit_is_named() -> None:
    here = ray_cluster._circumstances()
    ray_cluster._check_circumstances(here)
    with pytest.raises(RayClusterError, match=r"of the Ray cluster has torch .*, the one that asks has 0\.1"):
        ray_cluster._check_circumstances(here | {"torch": "0.1"})
