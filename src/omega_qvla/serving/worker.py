"""The one thread in which the policy infers, and the queue before it."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch

from omega_qvla.policy import DeclaredPolicy, Observation
from omega_qvla.serving.contract import Request
from omega_qvla.serving.limits import Limits
from omega_qvla.serving.metrics import Metrics
from omega_qvla.serving.refusal import Refusal
from omega_qvla.serving.shadow import Shadow

LOG = logging.getLogger("omega_qvla.serving")


@dataclass(frozen=True)
class Answer:
    """What the policy says to one observation."""

    actions: np.ndarray
    """In physical units, float32 [chunk, action dimension]."""
    waited: float
    """Seconds in the queue."""
    inferred: float
    """Seconds that the policy took."""


@dataclass(frozen=True)
class _Job:
    request: Request
    received: float
    future: Future[Answer]


class Worker:
    """Answers one observation after the other, in the order in which they came.

    The noise of all inferences comes from one generator: the same observations in the same order under the same seed
    get the same actions.
    """

    def __init__(
        self,
        policy: DeclaredPolicy,
        limits: Limits,
        metrics: Metrics,
        *,
        noise_seed: int = 0,
        shadow: Shadow | None = None,
    ) -> None:
        self._policy, self._limits, self._metrics, self._shadow = policy, limits, metrics, shadow
        self._noise = torch.Generator().manual_seed(noise_seed)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._stopping = False
        self._began: float | None = None
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)
        metrics.gauge("queue_depth", "Observations that wait for the policy.", self._jobs.qsize)

    def warm_up(self) -> float:
        """Seconds of a first inference on an observation of zeros, which later ones need not wait for.

        Raises what the policy raises: a server that cannot answer should not start.
        """
        interface, began = self._policy.interface(), time.monotonic()
        sizes = {name: size or (256, 256) for name, size in interface.cameras.items()}
        images = {name: np.zeros((1, *size, 3), np.uint8) for name, size in sizes.items()}
        observation = Observation(images, np.zeros((1, interface.state_width), np.float32), ("do nothing",))
        noise = torch.zeros(1, *self._policy.noise_shape)
        for policy in (self._policy, *([] if self._shadow is None else [self._shadow.policy])):
            policy.infer(observation, noise)
        return time.monotonic() - began

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, received: float) -> Future[Answer]:
        """Queue one request, whose message was whole at the time `received` of the monotonic clock.

        Cancel the future if nobody waits for it any more. Raises `Refusal` if too many wait, or the server stops.
        """
        if self._stopping:
            raise Refusal("stopping", "the server is shutting down; connect again when it is back")
        if self._jobs.qsize() >= self._limits.waiting:
            raise Refusal("busy", f"{self._limits.waiting} observations wait for the policy; try again later")
        job = _Job(request, received, Future())
        self._jobs.put(job)
        return job.future

    @property
    def healthy(self) -> bool:
        """Whether it takes observations, and no inference runs for suspiciously long."""
        began = self._began
        stuck = began is not None and time.monotonic() - began > self._limits.stuck_seconds
        return self._thread.is_alive() and not self._stopping and not stuck

    def stop(self) -> bool:
        """Finish the inference that runs, refuse those that wait; returns whether it ended in time."""
        self._stopping = True
        self._jobs.put(None)
        self._thread.join(self._limits.stop_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                self._metrics.dropped.inc()
            elif self._stopping:
                job.future.set_exception(
                    Refusal("stopping", "the server is shutting down; connect again when it is back")
                )
            else:
                self._answer(job)
            if self._shadow is not None and self._jobs.empty():
                self._shadow.idle.set()

    def _answer(self, job: _Job) -> None:
        if self._shadow is not None:
            self._shadow.idle.clear()
        noise = torch.randn(1, *self._policy.noise_shape, generator=self._noise)
        self._began = began = time.monotonic()
        try:
            actions = self._policy.infer(job.request.observation, noise, job.request.previous)
        except Exception as error:
            LOG.exception("the policy failed on an observation")
            reason = str(error) if isinstance(error, ValueError) else "the log of the server says why"
            job.future.set_exception(Refusal("policy", f"the policy could not answer: {reason}"))
            return
        finally:
            self._began = None
        ended = time.monotonic()
        self._metrics.inference.observe(ended - began)
        job.future.set_result(Answer(actions[0], began - job.received, ended - began))
        if self._shadow is not None:
            self._shadow.offer(job.request, noise, actions[0])
