"""A guard before libzmq, which itself takes any number of connections and any number of parts of a message.

It passes on the bytes of ZMTP, the protocol beneath ZeroMQ, as they are, and reads only where frames begin and end:
a client whose frame is too long, whose message has too many parts or takes too long, or who sends nothing at all,
is disconnected. Real clients connect again by themselves. Source: ZMTP 3.1, rfc.zeromq.org/spec/37.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from omega_qvla.serving.gate import Gate
from omega_qvla.serving.refusal import Refusal
from omega_qvla.serving.service import Service

_GREETING = 64
_MORE, _LONG, _COMMAND = 1, 2, 4
_SHORT_BYTES = 1024
_PARTS = 2
"""Of a request: an empty one, and the message."""
_PIECE = 64 * 1024


class ZmtpGuard:
    """Listens for clients and connects each, within the limits, to libzmq's socket at `inner`."""

    def __init__(self, service: Service, inner: Path) -> None:
        self._service, self._inner, self._gate = service, inner, Gate(service.limits)
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        service.metrics.gauge("clients", "Clients that are connected.", lambda: self._gate.clients)

    async def open(self, host: str, port: int) -> int:
        """Listen; returns the port, which the system chooses if it was 0. Raises `OSError` if it cannot."""
        self._server = await asyncio.start_server(self._client, host, port, limit=_PIECE)
        return self._server.sockets[0].getsockname()[1]

    def stop_listening(self) -> None:
        """Let nobody in any more."""
        if self._server is not None:
            self._server.close()
            self._gate.close_arriving()

    async def close(self) -> None:
        """Disconnect everyone."""
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, from its first byte to its last."""
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        self._gate.arrived(task, writer.transport.abort)
        try:
            inner_reader, inner_writer = await asyncio.open_unix_connection(str(self._inner), limit=_PIECE)
            try:
                up = self._guarded(reader, inner_writer, task)
                down = self._copied(inner_reader, writer)
                await _first(up, down)
            finally:
                inner_writer.transport.abort()
        except Refusal as refusal:
            self._service.refused(refusal, _name(writer))
        except (OSError, EOFError):
            pass  # it left
        finally:
            self._gate.left(task)
            self._clients.discard(task)
            writer.transport.abort()

    async def _guarded(self, reader: asyncio.StreamReader, inner: asyncio.StreamWriter, client: object) -> None:
        """From the client to libzmq, until the client leaves. Raises `Refusal` if it breaks a rule."""
        limits = self._service.limits
        async with _within(limits.handshake_seconds, "its handshake"):
            await _pass_on(reader, inner, _GREETING)
            await self._frame(reader, inner, await reader.readexactly(1))
        if not self._gate.admit(client):
            raise Refusal("busy", "all connections are taken")
        while True:
            async with _within(limits.idle_seconds, "its next message"):
                first = await reader.readexactly(1)
            async with _within(limits.message_seconds, "a message"):
                await self._message(reader, inner, first)

    async def _message(self, reader: asyncio.StreamReader, inner: asyncio.StreamWriter, first: bytes) -> None:
        """All frames of a message, of which the first byte has come."""
        more = await self._frame(reader, inner, first)
        parts = 1
        while more:
            flags = await reader.readexactly(1)
            parts += not flags[0] & _COMMAND  # which may stand between the parts and is none
            if parts > _PARTS:
                raise Refusal("size", f"its message had more than {_PARTS} parts")
            more = await self._frame(reader, inner, flags) or bool(flags[0] & _COMMAND)

    async def _frame(self, reader: asyncio.StreamReader, inner: asyncio.StreamWriter, flags: bytes) -> bool:
        """Pass on one frame; whether its message goes on. Raises `Refusal` if it is too long."""
        length = await reader.readexactly(8 if flags[0] & _LONG else 1)
        left = int.from_bytes(length, "big")
        short = flags[0] & (_COMMAND | _MORE)  # only the last part, the message, may be long
        limit = _SHORT_BYTES if short else self._service.contract.message_bytes
        if left > limit:
            raise Refusal("size", f"a frame of it had more than {limit} bytes")
        inner.write(flags + length)
        await _pass_on(reader, inner, left)
        return bool(flags[0] & _MORE)

    async def _copied(self, inner: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """From libzmq to the client, which has to take it."""
        while piece := await inner.read(_PIECE):
            writer.write(piece)
            async with _within(self._service.limits.message_seconds, "taking its answer"):
                await writer.drain()


async def _pass_on(reader: asyncio.StreamReader, inner: asyncio.StreamWriter, left: int) -> None:
    """Pass on so many bytes, as they come: a peer may wait for an answer to the first of them."""
    while left:
        piece = await reader.read(min(left, _PIECE))
        if not piece:
            raise EOFError
        left -= len(piece)
        inner.write(piece)
        await inner.drain()


@asynccontextmanager
async def _within(seconds: float, what: str) -> AsyncIterator[None]:
    """A time limit whose end is a refusal."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Refusal("slow", f"{what} took more than {seconds:g} s") from None


async def _first(*awaitables: Awaitable[None]) -> None:
    """Run all until one ends or fails; the others are cancelled."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _name(writer: asyncio.StreamWriter) -> str:
    address = writer.get_extra_info("peername")
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a client"
