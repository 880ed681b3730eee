"""What the protocols share: who may ask, answers with their deadline, and what is counted and logged."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omega_qvla.policy import DeclaredPolicy
from omega_qvla.serving import chunking
from omega_qvla.serving.contract import Contract
from omega_qvla.serving.limits import Limits
from omega_qvla.serving.metrics import Metrics
from omega_qvla.serving.refusal import Refusal
from omega_qvla.serving.worker import Answer, Worker

LOG = logging.getLogger("omega_qvla.serving")

_QUIET_SECONDS = 1.0
"""At most one line per kind and this time, so that clients cannot fill the disk of the robot."""


@dataclass
class Service:
    """One policy behind one protocol."""

    policy: DeclaredPolicy
    contract: Contract
    limits: Limits
    metrics: Metrics
    worker: Worker
    noise_seed: int
    deadline: float | None = None
    """Seconds from a whole message to its actions; None: none."""
    token: bytes | None = None
    _logged: dict[str, float] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        return self.worker.healthy

    def admits(self, token: bytes | None) -> bool:
        """Whether a client with this token may ask; the time that it takes does not tell how much of it is right."""
        return self.token is None or (token is not None and hmac.compare_digest(token, self.token))

    async def answer(self, fields: Mapping[Any, Any], received: float) -> tuple[Answer, dict[str, float | bool]]:
        """The policy's answer to the fields of a message that was whole at `received`, and how long it took.

        Raises `Refusal`. If it is cancelled before the policy has begun, the policy does not begin.
        """
        future = asyncio.wrap_future(self.worker.submit(self.contract.request(fields), received))
        try:
            missed = await self._deadline_missed(future, received)
            answer = await future
        finally:
            future.cancel()  # without effect on one that is done
        seconds = time.monotonic() - received
        self.metrics.answer.observe(seconds)
        self.metrics.answered.inc()
        timing: dict[str, float | bool] = {
            "infer_ms": 1000 * answer.inferred,
            "queue_ms": 1000 * answer.waited,
            "total_ms": 1000 * seconds,
        }
        if self.deadline is not None:
            timing |= {"deadline_ms": 1000 * self.deadline, "deadline_missed": missed}
        return answer, timing

    def refused(self, refusal: Refusal, client: str) -> None:
        """Count it, and log it unless another was logged just before."""
        self.metrics.refused.labels(refusal.reason).inc()
        self.log(f"refused {refusal.reason}", f"{client} was refused: {refusal}")

    def log(self, kind: str, line: str) -> None:
        """One line, unless one of this kind was logged just before."""
        now = time.monotonic()
        if now - self._logged.get(kind, -_QUIET_SECONDS) >= _QUIET_SECONDS:
            self._logged[kind] = now
            LOG.warning(line)

    def described(self) -> dict[str, Any]:
        """What a client can know before it sends anything."""
        interface = self.policy.interface()
        return {
            "policy": self.policy.label,
            "execution": self.policy.execution,
            "cameras": {
                self.contract.keys.cameras[name]: None if size is None else [*size, 3]
                for name, size in interface.cameras.items()
            },
            "state": {"keys": list(self.contract.keys.state), "dimension": interface.state_width},
            "prompt": self.contract.keys.prompt,
            "actions": {"chunk": self.policy.noise_shape[0], "dimension": interface.action_width},
            "execute_steps": self.policy.execute_steps,
            "previous_chunk": None
            if not interface.previous_actions
            else {
                "actions": {"key": chunking.LEFT_OVER, "at_most": interface.previous_actions},
                "delay": chunking.DELAY,
                "execution_horizon": chunking.HORIZON,
            },
            "noise_seed": self.noise_seed,
            "deadline_ms": None if self.deadline is None else 1000 * self.deadline,
        }

    async def _deadline_missed(self, future: asyncio.Future[Answer], received: float) -> bool:
        """Wait for the answer or the deadline; a miss is told when it happens and not when the answer comes."""
        if self.deadline is None:
            return False
        await asyncio.wait({future}, timeout=max(0.0, received + self.deadline - time.monotonic()))
        if future.done():
            return False
        self.metrics.deadline_misses.inc()
        self.log("deadline", f"the policy missed its deadline: no actions {1000 * self.deadline:.0f} ms after asked")
        return True
