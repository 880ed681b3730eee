"""openpi's protocol: a websocket that greets with metadata and answers every observation with a chunk of actions.

Messages are msgpack. An error is a text and closes the connection with code 1011. Plain HTTP on the same port answers
`/healthz` and `/metrics`. Source: openpi-client 0.1.2 and openpi's `websocket_policy_server.py`.
"""

from __future__ import annotations

import asyncio
import http
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import websockets
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from omega_qvla.policy import Interface
from omega_qvla.serving.contract import Keys
from omega_qvla.serving.gate import Gate
from omega_qvla.serving.http import CLOSE_SECONDS, QUIET, gated, name_of, page
from omega_qvla.serving.refusal import Refusal
from omega_qvla.serving.service import LOG, Service
from omega_qvla.serving.wire import pack, packed_for_openpi, unpack

_FRAMES = 4
"""Fragments of a message that are read before the server asks for them."""


def default_keys(interface: Interface) -> Keys:
    """The policy's own names below `observation/`."""
    return Keys({name: f"observation/{name}" for name in interface.cameras}, ("observation/state",), "prompt")


class OpenpiServer:
    """Serves websockets until it is closed."""

    def __init__(self, service: Service) -> None:
        self._service, self._gate = service, Gate(service.limits)
        self._server: Server | None = None
        self._answering = 0
        self._all_answered = asyncio.Event()
        self._all_answered.set()
        service.metrics.gauge("clients", "Clients that are connected.", lambda: self._gate.clients)

    async def open(self, host: str, port: int) -> int:
        """Listen; returns the port, which the system chooses if it was 0. Raises `OSError` if it cannot."""
        limits = self._service.limits
        self._server = await serve(
            self._talk,
            host,
            port,
            process_request=self._request,
            create_connection=gated(self._gate),
            origins=[None],  # browsers state one: no web page shall move the robot through its reader's machine
            compression=None,  # a small message would grow to any size
            max_size=self._service.contract.message_bytes,
            max_queue=_FRAMES,
            open_timeout=limits.handshake_seconds,
            ping_interval=limits.ping_seconds,
            ping_timeout=limits.ping_seconds,
            close_timeout=CLOSE_SECONDS,
            server_header=None,
            logger=QUIET,
        )
        return next(iter(self._server.sockets)).getsockname()[1]

    def stop_listening(self) -> None:
        """Let nobody in any more."""
        if self._server is not None:
            self._server.close(close_connections=False)
            self._gate.close_arriving()

    async def close(self) -> None:
        """Let answers that are ready reach their clients, tell those that are left, and close."""
        if self._server is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._service.limits.message_seconds):
                await self._all_answered.wait()
        going = [c.close(CloseCode.GOING_AWAY, "the server is shutting down") for c in self._server.connections]
        await asyncio.gather(*going)
        await self._server.wait_closed()

    async def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        """The HTTP answer to a request that does not become a websocket."""
        if (response := page(self._service, connection, request)) is not None or not self._gate.full:
            return response
        self._service.refused(Refusal("busy", "all connections are taken"), name_of(connection))
        return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "all connections are taken; try later\n")

    async def _talk(self, connection: ServerConnection) -> None:
        """One client, from its handshake to its end."""
        try:
            if not self._gate.admit(connection):
                raise Refusal("busy", "all connections are taken; try again later")
            await self._send(connection, pack(self._service.described()))
            while True:
                await self._exchange(connection, await self._receive(connection))
        except Refusal as refusal:
            self._service.refused(refusal, name_of(connection))
            await self._tell(connection, str(refusal))
        except websockets.ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code == CloseCode.MESSAGE_TOO_BIG:
                size = self._service.contract.message_bytes
                self._service.refused(Refusal("size", f"its message had more than {size} bytes"), name_of(connection))
        except TimeoutError:
            self._service.refused(Refusal("slow", "it did not take its answer"), name_of(connection))
        except Exception:
            LOG.exception("a client could not be served")
            await self._tell(connection, "the server failed; its log says why")
        finally:
            connection.transport.abort()

    async def _exchange(self, connection: ServerConnection, message: bytes | str) -> None:
        """Answer one message."""
        received = time.monotonic()
        if isinstance(message, str):
            raise Refusal("message", "the message is a text; send msgpack as a binary message")
        fields = unpack(message, self._service.limits)
        with self._answers():
            answer, timing = await _while_connected(connection, self._service.answer(fields, received))
            await self._send(
                connection, pack({"actions": packed_for_openpi(answer.actions), "server_timing": timing})
            )

    async def _receive(self, connection: ServerConnection) -> bytes | str:
        """A whole message, whose fragments must follow each other soon."""
        limits, fragments = self._service.limits, connection.recv_streaming()
        try:
            async with asyncio.timeout(limits.idle_seconds):
                first = await anext(fragments)
        except TimeoutError:
            raise Refusal("slow", f"no message came for {limits.idle_seconds:g} s; connect again") from None
        if isinstance(first, str):
            return first
        message = bytearray(first)
        try:
            async with asyncio.timeout(limits.message_seconds):
                async for fragment in fragments:
                    message += fragment  # type: ignore[arg-type]  # all are of the kind of the first
        except TimeoutError:
            raise Refusal(
                "slow", f"the message took more than {limits.message_seconds:g} s; send it at once"
            ) from None
        return bytes(message)

    async def _send(self, connection: ServerConnection, message: bytes | str) -> None:
        async with asyncio.timeout(self._service.limits.message_seconds):
            await connection.send(message)

    async def _tell(self, connection: ServerConnection, sentence: str) -> None:
        with suppress(websockets.ConnectionClosed, TimeoutError):
            await self._send(connection, sentence)
            await connection.close(CloseCode.INTERNAL_ERROR, "the text before says why")

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """While open, a client waits for an answer."""
        self._answering += 1
        self._all_answered.clear()
        try:
            yield
        finally:
            self._answering -= 1
            if not self._answering:
                self._all_answered.set()


async def _while_connected[T](connection: ServerConnection, answering: Coroutine[Any, Any, T]) -> T:
    """An answer, given up when its client is gone: nobody shall wait for a turn that nobody wants."""
    answer, gone = asyncio.ensure_future(answering), asyncio.ensure_future(connection.wait_closed())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise websockets.ConnectionClosedError(None, None)
        return answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()
