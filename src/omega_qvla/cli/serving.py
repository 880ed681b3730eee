"""The command that lets robots ask a policy for actions."""

from __future__ import annotations

import asyncio
import logging
import time
from enum import StrEnum
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Annotated

import typer

from omega_qvla.cli.shared import ERR, Execution, app

if TYPE_CHECKING:
    from omega_qvla.policy import Interface
    from omega_qvla.serving import Address, Settings


_LINES = 1000
"""Of the log that wait to be written."""
_LAST_LINES = 1.0
"""Seconds for them at the end."""


class Protocol(StrEnum):
    """What the clients speak."""

    openpi = "openpi"
    groot = "groot"


@app.command()
def serve(
    directory: Annotated[Path, typer.Argument(help="The policy, quantized or not.")],
    protocol: Annotated[Protocol, typer.Option(help="openpi: websocket; groot: ZeroMQ, as GR00T N1.5's clients.")],
    host: Annotated[str, typer.Option(help="Where to listen; elsewhere than on this machine a token is needed.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: 8000 (openpi), 5555 (groot).")] = None,
    token_file: Annotated[Path | None, typer.Option(help="A file with the token that clients must send.")] = None,
    camera: Annotated[
        list[str] | None,
        typer.Option(help="CAMERA=KEY: under which key the images of a camera come. Repeatable."),
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Under which key the state comes; several are put together. Repeatable."),
    ] = None,
    prompt: Annotated[str, typer.Option(metavar="KEY", help="Under which key the instruction comes.")] = "",
    action: Annotated[
        list[str] | None,
        typer.Option(help="KEY=WIDTH: a part of the actions that are sent, with groot. Repeatable."),
    ] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Report observations that are not answered in this time.")
    ] = None,
    noise_seed: Annotated[int, typer.Option(min=0, help="Of the generator of all initial noise.")] = 0,
    shadow: Annotated[
        Path | None,
        typer.Option(help="A full-precision checkpoint that is compared with what was answered, when there is time."),
    ] = None,
    shadow_json: Annotated[Path, typer.Option(help="Where the comparison is written at the end.")] = Path(
        "shadow.json"
    ),
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="With groot: /healthz and /metrics on this machine.")
    ] = 9464,
    execution: Annotated[Execution, typer.Option(help="Arithmetic of executable recipes.")] = Execution.integer,
) -> None:
    """Answer robots that speak openpi's or GR00T's protocol, until SIGINT or SIGTERM.

    Observations must be exactly what the policy was trained with; by default under its own names of cameras.
    """
    from omega_qvla.policies import open_or_load
    from omega_qvla.serving import PORTS, Address, check_exposure, read_token, run
    from omega_qvla.serving.shadow import Shadow

    token = None if token_file is None else read_token(token_file)
    check_exposure(host, token)
    policy = open_or_load(directory, execution.value)
    settings = _settings(
        protocol, policy.interface(), camera or [], state or [], prompt, action or [], token, deadline_ms, noise_seed
    )
    watching = None if shadow is None else Shadow(open_or_load(shadow, execution.value), policy)
    lines = _log()
    address = Address(
        host, PORTS[protocol.value] if port is None else port, metrics_port if protocol is Protocol.groot else None
    )
    try:
        asyncio.run(run(policy, settings, address, shadow=watching, on_ready=lambda at: _announce(settings, at)))
    finally:
        _written(lines)
        if watching is not None:
            watching.write(shadow_json)
            ERR.print(f"shadow: {shadow_json}")


class _NeverWaits(QueueHandler):
    """Hands lines to a thread; those that do not fit are lost, and not the robot's time."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's own name
        pass


def _log() -> Queue[logging.LogRecord]:
    """The server's own lines on stderr, whatever the libraries of policies did to logging.

    Who started the server may not read them: a full pipe stops a thread that does nothing else. Returns the lines
    that wait for it.
    """
    lines: Queue[logging.LogRecord] = Queue(_LINES)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    QueueListener(lines, handler).start()
    logger = logging.getLogger("omega_qvla.serving")
    logger.addHandler(_NeverWaits(lines))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return lines


def _written(lines: Queue[logging.LogRecord]) -> None:
    """Wait for the last lines, but not for somebody to read them."""
    end = time.monotonic() + _LAST_LINES
    while lines.unfinished_tasks and time.monotonic() < end:
        time.sleep(0.01)


def _settings(
    protocol: Protocol,
    interface: Interface,
    cameras: list[str],
    state: list[str],
    prompt: str,
    actions: list[str],
    token: bytes | None,
    deadline_ms: float | None,
    noise_seed: int,
) -> Settings:
    from omega_qvla.serving import Settings, groot, openpi
    from omega_qvla.serving.contract import keys_with

    if protocol is Protocol.openpi and actions:
        raise ValueError("openpi's actions have no parts; --action is for --protocol groot")
    module = groot if protocol is Protocol.groot else openpi
    return Settings(
        protocol.value,
        keys_with(module.default_keys(interface), cameras, state, prompt),
        groot.action_keys(interface, actions) if protocol is Protocol.groot else {},
        token=token,
        deadline=None if deadline_ms is None else deadline_ms / 1000,
        noise_seed=noise_seed,
    )


def _announce(settings: Settings, address: Address) -> None:
    scheme = "ws" if settings.protocol == "openpi" else "tcp"
    ERR.print(f"listening on {scheme}://{address.host}:{address.port}, noise seed {settings.noise_seed}")
    for camera, key in settings.keys.cameras.items():
        ERR.print(f"  camera {camera}: {key}", highlight=False)
    ERR.print(f"  state: {' + '.join(settings.keys.state)}", highlight=False)
    ERR.print(f"  instruction: {settings.keys.prompt}", highlight=False)
    pages = address.port if address.metrics_port is None else address.metrics_port
    at = address.host if address.metrics_port is None else "127.0.0.1"
    ERR.print(f"  health and metrics: http://{at}:{pages}/healthz, /metrics", highlight=False)
