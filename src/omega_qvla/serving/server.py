"""A policy server from its parts: what listens, how it starts, and how it ends."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from omega_qvla.policy import DeclaredPolicy
from omega_qvla.serving import groot, openpi
from omega_qvla.serving.contract import Contract, Keys
from omega_qvla.serving.http import HttpServer
from omega_qvla.serving.limits import Limits
from omega_qvla.serving.metrics import Metrics
from omega_qvla.serving.service import Service
from omega_qvla.serving.shadow import Shadow
from omega_qvla.serving.wire import described_by_groot, described_by_openpi
from omega_qvla.serving.worker import Worker

LOG = logging.getLogger("omega_qvla.serving")

ProtocolName = Literal["openpi", "groot"]
PORTS: Mapping[ProtocolName, int] = {"openpi": 8000, "groot": 5555}
"""Those of the originals."""
_SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int
    metrics_port: int | None = None
    """Of a protocol that has no HTTP of its own; on the loopback interface only."""


@dataclass(frozen=True)
class Settings:
    """How a policy is served."""

    protocol: ProtocolName
    keys: Keys
    actions: Mapping[str, int] = field(default_factory=dict)
    """Keys and widths of the parts of an action; of `groot` only."""
    token: bytes | None = None
    deadline: float | None = None
    """Seconds from a whole message to its actions, after which the policy is reported."""
    noise_seed: int = 0
    limits: Limits = field(default_factory=Limits)


class _Listener(Protocol):
    async def open(self, host: str, port: int) -> int: ...

    def stop_listening(self) -> None: ...

    async def close(self) -> None: ...


def check_exposure(host: str, token: bytes | None) -> None:
    """Raises `ValueError` if a server would listen to other machines and asks for no token."""
    if token is None and not is_loopback(host):
        raise ValueError(f"whoever reaches {host} could move the robot; give --token-file, or listen on 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it. Names other than `localhost` are not believed."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> bytes:
    """The token in a file, without the line's end. Raises `ValueError` if it is short, or no line of text."""
    token = path.read_bytes().strip()
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or len(token.split()) != 1:
        raise ValueError(
            f"{path} holds no token: write one line of at least {_SHORTEST_TOKEN} letters and digits, for example "
            "with `openssl rand -hex 32`"
        )
    return token


async def run(
    policy: DeclaredPolicy,
    settings: Settings,
    address: Address,
    *,
    shadow: Shadow | None = None,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[Address], None] = lambda address: None,
) -> None:
    """Serve until SIGINT or SIGTERM, or until `stop` is set.

    `on_ready` is told where it listens. Then: nobody new is let in, the inference that runs is answered, those that
    wait are told, everything is closed.

    Raises `ValueError` for an address that needs a token, `OSError` if it cannot listen, and what the policy raises
    if it cannot infer.
    """
    check_exposure(address.host, settings.token)
    metrics, stopped = Metrics(), stop or asyncio.Event()
    worker = Worker(policy, settings.limits, metrics, noise_seed=settings.noise_seed, shadow=shadow)
    listeners = _listeners(policy, settings, address, metrics, worker)
    LOG.info("the first inference took %.2f s", await asyncio.to_thread(worker.warm_up))
    worker.start()
    if shadow is not None:
        shadow.start(metrics)
    opened: list[_Listener] = []
    try:
        ports = []
        for listener, host, port in listeners:
            opened.append(listener)
            ports.append(await listener.open(host, port))
        if stop is None:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stopped.set)
        on_ready(Address(address.host, ports[0], ports[1] if len(ports) > 1 else None))
        await stopped.wait()
        LOG.info("shutting down")
    finally:
        await _end(opened, worker, shadow, settings.limits)


async def _end(opened: list[_Listener], worker: Worker, shadow: Shadow | None, limits: Limits) -> None:
    for listener in opened:
        listener.stop_listening()
    if not await asyncio.to_thread(worker.stop):
        LOG.warning("the policy did not finish its inference within %g s", limits.stop_seconds)
    for listener in opened:
        await listener.close()
    if shadow is not None:
        await asyncio.to_thread(shadow.stop, limits.stop_seconds)


def _listeners(
    policy: DeclaredPolicy, settings: Settings, address: Address, metrics: Metrics, worker: Worker
) -> list[tuple[_Listener, str, int]]:
    """What listens, and where: the protocol, and for one without HTTP, HTTP."""
    is_groot = settings.protocol == "groot"
    described = described_by_groot if is_groot else described_by_openpi
    contract = Contract(
        policy.interface(),
        settings.keys,
        settings.limits,
        described,
        time_axis=is_groot,
        action_parts=settings.actions if is_groot else None,
    )
    service = Service(
        policy,
        contract,
        settings.limits,
        metrics,
        worker,
        settings.noise_seed,
        settings.deadline,
        settings.token,
    )
    if not is_groot:
        return [(openpi.OpenpiServer(service), address.host, address.port)]
    listeners: list[tuple[_Listener, str, int]] = [
        (groot.GrootServer(service, settings.actions), address.host, address.port)
    ]
    if address.metrics_port is not None:
        listeners.append((HttpServer(service), "127.0.0.1", address.metrics_port))
    return listeners
