"""GR00T's protocol: requests and replies over ZeroMQ, as the clients of Isaac-GR00T N1.5 speak it.

A request is `{"endpoint", "data", "api_token"?}` in msgpack, arrays are the bytes of `numpy.save`. `get_action` takes
flat fields such as `video.back` [1, H, W, 3] and `state.arm` [1, D], and answers with `action.arm` [chunk, D]. For
real-time chunking, `prev_chunk_left_over` is such an answer without what was executed. An error is
`{"error": sentence}`. Source: `gr00t/eval/service.py` of Isaac-GR00T N1.5.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zmq
import zmq.asyncio

from omega_qvla.policy import Interface
from omega_qvla.serving import chunking
from omega_qvla.serving.contract import Keys
from omega_qvla.serving.refusal import Refusal
from omega_qvla.serving.service import LOG, Service
from omega_qvla.serving.wire import pack, packed_for_groot, unpack
from omega_qvla.serving.zmtp import ZmtpGuard

_PROMPT = "annotation.human.action.task_description"
_ENDPOINTS = ("ping", "get_action", "get_modality_config")


def default_keys(interface: Interface) -> Keys:
    """The policy's own names of cameras and of the parts of its state, each with its modality."""
    cameras = {name: f"video.{name}" for name in interface.cameras}
    return Keys(cameras, tuple(f"state.{part}" for part in interface.state), _PROMPT)


def action_keys(interface: Interface, stated: Sequence[str] = ()) -> dict[str, int]:
    """Under which keys an action is sent, and how many numbers each has: by the policy's names, or as KEY=WIDTH.

    Raises `ValueError` if what is stated does not make up an action.
    """
    if not stated:
        return {f"action.{part}": width for part, width in interface.actions.items()}
    keys: dict[str, int] = {}
    for option in stated:
        key, _, width = option.rpartition("=")
        if not key or not width.isdecimal() or int(width) < 1 or key in keys:
            raise ValueError(f"{option!r} names no part of an action, or one again; write KEY=WIDTH once for each")
        keys[key] = int(width)
    if sum(keys.values()) != interface.action_width:
        raise ValueError(f"the parts have {sum(keys.values())} numbers, an action {interface.action_width}")
    return keys


class GrootServer:
    """Serves requests until it is closed."""

    def __init__(self, service: Service, actions: Mapping[str, int]) -> None:
        """`actions`: under which keys the parts of an action are sent, in their order, and their widths."""
        self._service, self._actions = service, actions
        self._directory = tempfile.TemporaryDirectory(prefix="omega-qvla-")
        self._inner = Path(self._directory.name) / "requests"
        self._guard = ZmtpGuard(service, self._inner)
        self._context = zmq.asyncio.Context()
        self._replying: dict[bytes, asyncio.Task[None]] = {}
        self._receiving: asyncio.Task[None] | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen; returns the port, which the system chooses if it was 0. Raises `OSError` if it cannot."""
        self._socket = self._context.socket(zmq.ROUTER)  # a REP would let no ping through while the policy infers
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, self._service.contract.message_bytes)
        self._socket.setsockopt(zmq.RCVHWM, 1)
        self._socket.setsockopt(zmq.SNDHWM, 4)
        self._socket.bind(f"ipc://{self._inner}")
        self._receiving = asyncio.create_task(self._receive())
        return await self._guard.open(host, port)

    def stop_listening(self) -> None:
        """Let nobody in any more."""
        if self._receiving is not None:
            self._guard.stop_listening()

    async def close(self) -> None:
        """Let replies that are ready reach their clients, and close."""
        if self._replying:
            await asyncio.wait(self._replying.values(), timeout=self._service.limits.message_seconds)
        await asyncio.sleep(0.1)  # libzmq and the guard hand over what was replied
        if self._receiving is not None:
            self._receiving.cancel()
        await self._guard.close()
        self._context.destroy(linger=0)
        self._directory.cleanup()

    async def _receive(self) -> None:
        while True:
            client, *parts = await self._socket.recv_multipart()
            received = time.monotonic()
            if len(parts) != 2 or parts[0]:
                self._service.refused(Refusal("message", "it sent no request"), "a client")
            elif client in self._replying:
                await self._send(client, self._error(Refusal("busy", "send one request after the other")))
            else:
                task = asyncio.create_task(self._reply(client, parts[1], received))
                self._replying[client] = task
                task.add_done_callback(partial(self._replied, client))

    async def _reply(self, client: bytes, message: bytes, received: float) -> None:
        try:
            answer = await self._answer(unpack(message, self._service.limits), received)
        except Refusal as refusal:
            answer = self._error(refusal)
        except Exception:
            LOG.exception("a client could not be served")
            answer = {"error": "the server failed; its log says why"}
        await self._send(client, answer)

    def _replied(self, client: bytes, task: asyncio.Task[None]) -> None:
        del self._replying[client]

    async def _send(self, client: bytes, answer: Mapping[str, Any]) -> None:
        await self._socket.send_multipart([client, b"", pack(answer)])

    def _error(self, refusal: Refusal) -> dict[str, str]:
        self._service.refused(refusal, "a client")
        return {"error": str(refusal)}

    async def _answer(self, request: dict[Any, Any], received: float) -> dict[str, Any]:
        token, endpoint, data = (request.pop(name, None) for name in ("api_token", "endpoint", "data"))
        if not self._service.admits(token.encode() if isinstance(token, str) else None):
            raise Refusal("token", "the token is missing or wrong; send it as 'api_token'")
        if request or endpoint not in _ENDPOINTS:
            raise Refusal(
                "fields", f"the request names no endpoint of this server; it has {', '.join(_ENDPOINTS)}, and no more"
            )
        if endpoint == "ping":
            return {"status": "ok", "message": "Server is running"}
        if endpoint == "get_modality_config":
            return self._modalities()
        if not isinstance(data, dict):
            raise Refusal("fields", "'data' is no map; send the fields of one observation in it")
        answer, _ = await self._service.answer(data, received)
        ends = np.cumsum([*self._actions.values()])[:-1]
        return {
            key: packed_for_groot(np.ascontiguousarray(part))
            for key, part in zip(self._actions, np.split(answer.actions, ends, axis=-1), strict=True)
        }

    def _modalities(self) -> dict[str, Any]:
        """What clients ask for to know which fields to send; every field is of one moment, actions of a chunk."""
        keys = self._service.contract.keys
        chunk = list(range(self._service.policy.noise_shape[0]))
        configs = {
            "video": (list(keys.cameras.values()), [0]),
            "state": (list(keys.state), [0]),
            "action": (list(self._actions), chunk),
            "language": ([keys.prompt], [0]),
        }
        if most := self._service.contract.interface.previous_actions:
            configs[chunking.LEFT_OVER] = (list(self._actions), list(range(most)))
        return {
            modality: {
                "__ModalityConfig_class__": True,
                "as_json": json.dumps({"delta_indices": moments, "modality_keys": names}),
            }
            for modality, (names, moments) in configs.items()
        }
