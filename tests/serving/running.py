"""A server in a thread, a policy for it, and clients."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack
import numpy as np
import torch
from line_world import Servo
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from omega_qvla.policy import Interface, Observation, PreviousChunk
from omega_qvla.serving import Address, Settings, groot, openpi, run
from omega_qvla.serving.contract import Keys
from omega_qvla.serving.limits import Limits
from omega_qvla.serving.shadow import Shadow

INTERFACE = Interface({"back": (8, 8), "front": (8, 8)}, {"state": 2}, {"action": 2}, previous_actions=4)
QUICK = Limits(
    handshake_seconds=0.5, message_seconds=0.5, idle_seconds=5.0, ping_seconds=1.0, stop_seconds=5.0, connections=6
)


@dataclass
class Declared(Servo):
    """Steps towards the origin, or as the previous chunk does while that is executed, and says what it takes; holds
    the answer back while `gate` is not set."""

    gate: threading.Event = field(default_factory=threading.Event)
    seen: list[Observation] = field(default_factory=list)
    continued: list[PreviousChunk | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    def interface(self) -> Interface:
        return INTERFACE

    def infer(
        self, observation: Observation, noise: torch.Tensor, previous: PreviousChunk | None = None
    ) -> np.ndarray:
        if observation.instructions == ("fail",):
            raise RuntimeError("a secret of the server")
        self.seen.append(observation)
        self.continued.append(previous)
        self.gate.wait()
        actions = super().infer(observation, noise)
        if previous is not None:
            actions[:, : previous.delay] = previous.actions[:, : previous.delay]
        return actions


@dataclass(frozen=True)
class Running:
    """Where a server listens, and how to stop it."""

    address: Address
    stop: threading.Event

    def client(self, **options: Any) -> WebsocketClientPolicy:
        """A client of openpi, which stays connected."""
        return WebsocketClientPolicy("127.0.0.1", self.address.port, **options)

    def ask(self, **changes: Any) -> np.ndarray:
        """The actions that a client gets, which leaves then."""
        client = self.client()
        try:
            return client.infer(observation(**changes))["actions"]
        finally:
            client._ws.close()

    def page(self, path: str, token: str | None = None) -> str:
        port = self.address.port if self.address.metrics_port is None else self.address.metrics_port
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
        if token is not None:
            request.add_header("Authorization", f"Api-Key {token}")
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()

    def metric(self, name: str, token: str | None = None) -> float:
        lines = (line.rsplit(" ", 1) for line in self.page("/metrics", token).splitlines())
        return next(float(value) for key, value in lines if key == f"omega_qvla_{name}")


def settings(protocol: str = "openpi", keys: Keys | None = None, **options: Any) -> Settings:
    module = groot if protocol == "groot" else openpi
    actions = groot.action_keys(INTERFACE) if protocol == "groot" else {}
    chosen = Settings(protocol, keys or module.default_keys(INTERFACE), actions, limits=QUICK)  # type: ignore[arg-type]
    return replace(chosen, **options)


@contextmanager
def running(policy: Declared, chosen: Settings, shadow: Shadow | None = None) -> Iterator[Running]:
    """Serve while open; what fails in the server fails here."""
    ready: Future[Address] = Future()
    stopping = threading.Event()

    async def serve() -> None:
        stop = asyncio.Event()
        address = Address("127.0.0.1", 0, 0 if chosen.protocol == "groot" else None)
        serving = asyncio.create_task(
            run(policy, chosen, address, shadow=shadow, stop=stop, on_ready=ready.set_result)
        )
        while not stopping.is_set() and not serving.done():
            await asyncio.sleep(0.02)
        stop.set()
        await serving

    def target() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failed.append(error)
            if not ready.done():
                ready.set_exception(error)

    failed: list[BaseException] = []
    thread = threading.Thread(target=target)
    thread.start()
    try:
        yield Running(ready.result(20), stopping)
    finally:
        stopping.set()
        if failed:
            policy.gate.set()
        thread.join(20)
    assert not thread.is_alive() and not failed, failed


def observation(shade: int = 7, **changes: Any) -> dict[str, Any]:
    """What a client of openpi sends."""
    images = {f"observation/{name}": np.full((8, 8, 3), shade, np.uint8) for name in ("back", "front")}
    return {**images, "observation/state": np.array([0.5, -0.25]), "prompt": "go"} | changes


def request(endpoint: str, data: Any = None, **more: Any) -> bytes:
    """What a client of GR00T sends."""
    return msgpack.packb({"endpoint": endpoint, **({} if data is None else {"data": data}), **more})


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
