"""The two pages of a server, `/healthz` and `/metrics`, and the settings of the library that serves them."""

from __future__ import annotations

import asyncio
import http
import logging

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from omega_qvla.serving.gate import Gate
from omega_qvla.serving.metrics import CONTENT_TYPE
from omega_qvla.serving.refusal import Refusal
from omega_qvla.serving.service import Service

_SCHEME = "Api-Key "
CLOSE_SECONDS = 2.0
"""For a client to agree that the connection is closed."""

QUIET = logging.getLogger("omega_qvla.serving.websockets")
QUIET.setLevel(logging.CRITICAL)  # the library logs a traceback for every port scan; what matters is logged by us


def page(service: Service, connection: ServerConnection, request: Request) -> Response | None:
    """The page that is asked for, or why it is not given; None for any other path.

    `/healthz` is open to everyone, all others need the token if there is one.
    """
    if request.path == "/healthz":
        status = http.HTTPStatus.OK if service.healthy else http.HTTPStatus.SERVICE_UNAVAILABLE
        return connection.respond(status, "OK\n" if service.healthy else "the policy does not answer\n")
    if not service.admits(_token(request.headers)):
        service.refused(Refusal("token", "its token is missing or wrong"), name_of(connection))
        sentence = "the token is missing or wrong; send the header 'Authorization: Api-Key TOKEN'\n"
        return connection.respond(http.HTTPStatus.UNAUTHORIZED, sentence)
    if request.path == "/metrics":
        body = service.metrics.text()
        headers = Headers({"Content-Type": CONTENT_TYPE, "Content-Length": str(len(body)), "Connection": "close"})
        return Response(http.HTTPStatus.OK, "OK", headers, body)
    return None


def gated(gate: Gate) -> type[ServerConnection]:
    """Connections that the gate knows from their first byte to their last."""

    class Gated(ServerConnection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            gate.arrived(self, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            gate.left(self)
            super().connection_lost(exc)

    return Gated


class HttpServer:
    """Serves the pages alone, beside a protocol that has no HTTP."""

    def __init__(self, service: Service) -> None:
        self._service, self._gate = service, Gate(service.limits)
        self._server: Server | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen; returns the port, which the system chooses if it was 0. Raises `OSError` if it cannot."""
        self._server = await serve(
            _nobody,
            host,
            port,
            process_request=self._page,
            create_connection=gated(self._gate),
            open_timeout=self._service.limits.handshake_seconds,
            close_timeout=CLOSE_SECONDS,
            server_header=None,
            logger=QUIET,
        )
        return next(iter(self._server.sockets)).getsockname()[1]

    def stop_listening(self) -> None:
        """Let nobody in any more."""
        if self._server is not None:
            self._server.close()
            self._gate.close_arriving()

    async def close(self) -> None:
        """Wait for the last page to be sent."""
        if self._server is not None:
            await self._server.wait_closed()

    async def _page(self, connection: ServerConnection, request: Request) -> Response:
        sentence = "there are /healthz and /metrics\n"
        return page(self._service, connection, request) or connection.respond(http.HTTPStatus.NOT_FOUND, sentence)


def name_of(connection: ServerConnection) -> str:
    """Address and port of a client, for the log."""
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a client"


async def _nobody(connection: ServerConnection) -> None:
    """No request becomes a websocket."""


def _token(headers: Headers) -> bytes | None:
    values = headers.get_all("Authorization")
    if len(values) != 1 or not values[0].startswith(_SCHEME):
        return None
    return values[0].removeprefix(_SCHEME).encode("utf-8", "surrogateescape")
