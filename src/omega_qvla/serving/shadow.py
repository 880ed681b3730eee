"""Shadow mode: while the server is idle, another policy computes what was answered, and the difference is kept."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, Full, Queue

import numpy as np
import torch
from prometheus_client import Metric
from prometheus_client.registry import Collector

from omega_qvla.policy import DeclaredPolicy
from omega_qvla.serving.contract import Request
from omega_qvla.serving.metrics import Metrics

LOG = logging.getLogger("omega_qvla.serving")

_WAITING = 4
"""Observations that wait to be compared; the images of each are in memory."""
_LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class Differences:
    """How far the served policy was from the reference, over all answers that were compared.

    Normalized MSE as in `omega_qvla.evaluation.fidelity`: the sum of squared differences over that of the reference's
    squared deviations from its mean; 0 is equality, 1 is no better than a constant action.
    """

    observations: int
    normalized_mse: float | None
    """Mean over the dimensions that vary; None as long as none does."""
    normalized_mse_per_dimension: tuple[float | None, ...]
    maximum_error_per_dimension: tuple[float, ...]
    """Largest |a − r| in physical units."""
    gripper_flips: float | None
    """Share of actions whose gripper command has the other sign; None for a robot without a gripper."""


class Tally:
    """Sums from which the differences follow, for actions of D dimensions."""

    def __init__(self, dimensions: int, gripper: int | None = -1) -> None:
        """`gripper`: the index of the gripper's dimension, or None for a robot without one."""
        self._gripper, self._observations, self._flips, self._actions = gripper, 0, 0, 0
        self._squared, self._maximum = np.zeros(dimensions), np.zeros(dimensions)
        self._mean, self._spread = np.zeros(dimensions), np.zeros(dimensions)

    def add(self, reference: np.ndarray, actions: np.ndarray) -> None:
        """One answer, both float32 [chunk, D]."""
        wanted, actual = reference.astype(np.float64), actions.astype(np.float64)
        self._squared += ((actual - wanted) ** 2).sum(axis=0)
        self._maximum = np.maximum(self._maximum, np.abs(actual - wanted).max(axis=0))
        # Mean and spread of what came before, merged with those of this chunk: no difference of large sums.
        count, shift = self._actions + len(wanted), wanted.mean(axis=0) - self._mean
        self._spread += ((wanted - wanted.mean(axis=0)) ** 2).sum(axis=0)
        self._spread += shift**2 * self._actions * len(wanted) / count
        self._mean += shift * len(wanted) / count
        self._actions, self._observations = count, self._observations + 1
        if self._gripper is not None:
            self._flips += int(((actual < 0) != (wanted < 0))[:, self._gripper].sum())

    def differences(self) -> Differences:
        ratios = tuple(
            float(error / spread) if spread > 0 else None
            for error, spread in zip(self._squared, self._spread, strict=True)
        )
        varying = [ratio for ratio in ratios if ratio is not None]
        return Differences(
            observations=self._observations,
            normalized_mse=float(np.mean(varying)) if varying else None,
            normalized_mse_per_dimension=ratios,
            maximum_error_per_dimension=tuple(map(float, self._maximum)),
            gripper_flips=None if self._gripper is None else self._flips / max(1, self._actions),
        )


class Shadow(Collector):
    """Compares in a thread of its own, of lowest priority, which begins nothing while the server infers."""

    def __init__(self, policy: DeclaredPolicy, served: DeclaredPolicy, gripper: int | None = -1) -> None:
        """Raises `ValueError` if the two policies do not take the same, or give actions of another shape."""
        if policy.interface() != served.interface() or policy.noise_shape != served.noise_shape:
            raise ValueError(
                f"{policy.label!r} takes or gives something else than {served.label!r}; give --shadow the checkpoint "
                "that was quantized"
            )
        self.policy, self._served = policy, served.label
        self.idle = threading.Event()
        self.idle.set()
        self._waiting: Queue[tuple[Request, torch.Tensor, np.ndarray]] = Queue(_WAITING)
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._tally = Tally(policy.interface().action_width, gripper)
        self._dropped = self._failed = 0
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)

    def start(self, metrics: Metrics) -> None:
        metrics.registry.register(self)
        self._thread.start()

    def offer(self, request: Request, noise: torch.Tensor, actions: np.ndarray) -> None:
        """Compare actions [chunk, D] with the reference's when there is time; dropped if too many wait already."""
        try:
            self._waiting.put_nowait((request, noise, actions))
        except Full:
            with self._lock:
                self._dropped += 1

    def stop(self, seconds: float) -> None:
        """End after the comparison that runs; those that wait are dropped."""
        self._stopping.set()
        self.idle.set()
        self._thread.join(seconds)
        with self._lock:
            self._dropped += self._waiting.qsize()

    def write(self, path: Path) -> None:
        """The differences as JSON; the file appears under its name only when it is complete."""
        with self._lock:
            document = {
                "policy": self._served,
                "reference": self.policy.label,
                **asdict(self._tally.differences()),
                "dropped": self._dropped,
                "failed": self._failed,
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            found, dropped, failed = self._tally.differences(), self._dropped, self._failed
        for name, value in (("compared", found.observations), ("dropped", dropped), ("failed", failed)):
            yield _metric(f"shadow_{name}", "counter", "total", [({}, value)])
        ratios, maxima = found.normalized_mse_per_dimension, found.maximum_error_per_dimension
        yield _metric("shadow_normalized_mse", "gauge", "", [(_at(d), value) for d, value in enumerate(ratios)])
        yield _metric("shadow_maximum_error", "gauge", "", [(_at(d), value) for d, value in enumerate(maxima)])
        yield _metric("shadow_gripper_flips", "gauge", "", [({}, found.gripper_flips)])

    def _run(self) -> None:
        if sys.platform == "linux":  # there it is of this thread, and of those that torch starts from it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        while not self._stopping.is_set():
            try:
                request, noise, actions = self._waiting.get(timeout=0.1)
            except Empty:
                continue
            self.idle.wait()
            if self._stopping.is_set():
                with self._lock:
                    self._dropped += 1
                return
            try:
                reference = self.policy.infer(request.observation, noise, request.previous)[0]
            except Exception:
                LOG.exception("the policy of the shadow failed on an observation")
                with self._lock:
                    self._failed += 1
                continue
            with self._lock:
                self._tally.add(reference, actions)


def _metric(name: str, kind: str, suffix: str, samples: list[tuple[dict[str, str], float | None]]) -> Metric:
    metric = Metric(f"omega_qvla_{name}", _DOCUMENTATION[name], kind)
    for labels, value in samples:
        if value is not None:
            metric.add_sample("_".join(filter(None, (f"omega_qvla_{name}", suffix))), labels, value)
    return metric


def _at(dimension: int) -> dict[str, str]:
    return {"dimension": str(dimension)}


_DOCUMENTATION = {
    "shadow_compared": "Answers compared with full precision.",
    "shadow_dropped": "Answers not compared, because too many waited.",
    "shadow_failed": "Answers on which full precision failed.",
    "shadow_normalized_mse": "Squared difference to full precision over the variance of full precision.",
    "shadow_maximum_error": "Largest difference to full precision, in physical units.",
    "shadow_gripper_flips": "Share of actions whose gripper command has the other sign.",
}
