"""Ten thousand clients that mean no good, against a policy server in a process of its own.

    python scripts/fuzz_server.py [--protocol openpi|groot] [--messages 10000] [--seed 0]

Damaged and random msgpack, messages that are too large, arrays of a wrong dtype or shape, images, states and previous
chunks of NaN, sockets that say nothing, frames that come byte by byte, clients that never read their answers. Between
them a good client asks again and again. Printed at the end: the server's memory before, at most and after, what it
refused and why, how long the good client waited, and one line of JSON. It fails if the good client was ever not
answered.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import zmq
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from omega_qvla import api
from omega_qvla.serving.wire import packed_for_groot

HOST = "127.0.0.1"
HELD_AT_ONCE = {False: 200, True: 8}
"""Sockets that the attacker keeps open, before and after the handshake; with more, all places are taken."""
GOOD_EVERY = 100
PATIENCE = 60
"""Seconds after which the good client counts as not answered."""
_PROMPT = "annotation.human.action.task_description"


class Attacker:
    """Everything random comes from one seed. `size`, `state` and `action`: of the policy's square images, state and
    actions."""

    def __init__(
        self, protocol: str, port: int, seed: int, *, size: int = 96, state: int = 4, action: int = 4
    ) -> None:
        self.random, self.protocol, self.port = random.Random(seed), protocol, port
        self.size, self.state, self.action = size, state, action
        self.held: dict[bool, list[socket.socket]] = {False: [], True: []}
        self.attacks: list[Callable[[], None]] = [
            *[self.damaged, self.noise, self.bomb, self.wrong_field, self.wrong_chunk] * 4,
            *[self.too_large, self.half_open, self.slow_writer] * 2,
            self.never_reads,
        ]

    def attack(self) -> str:
        """One of them, at random; returns what it was."""
        attack = self.random.choice(self.attacks)
        with suppress(OSError):  # the server has closed, or let nobody in: so it may be
            attack()
        return attack.__name__.replace("_", " ")

    def damaged(self) -> None:
        """A right message in which some bytes that are no pixels are others, or which is cut off."""
        message = bytearray(self.right())
        for _ in range(self.random.randint(1, 8)):
            message[self.random.choice((1, -1)) * self.random.randrange(1, 100)] = self.random.randrange(256)
        self.send(bytes(message[: self.random.choice((len(message), self.random.randrange(len(message))))]))

    def noise(self) -> None:
        self.send(self.random.randbytes(self.random.randrange(4096)))

    def bomb(self) -> None:
        """Little that stands for much: empty containers, announced lengths, depth."""
        self.send(
            self.random.choice(
                (
                    b"\x81\xa1a\xdd" + struct.pack(">I", 60_000) + b"\x80" * 60_000,
                    b"\xdf\xff\xff\xff\xff",
                    b"\x81\xa1a\xc6\xff\xff\xff\xff",
                    b"\x91" * 60_000,
                    msgpack.packb({"a": msgpack.ExtType(5, b"x" * 1000)}),
                )
            )
        )

    def wrong_field(self) -> None:
        """A message that is right but for one field."""
        fields = self.fields()
        image, *_, state, prompt = fields
        shape = fields[image].shape
        key, value = self.random.choice(
            (
                (image, np.full(shape, np.nan, np.float32)),
                (image, np.zeros(shape, np.float64)),
                (image, np.zeros((*shape[:-3], 7, 7, 3), np.uint8)),
                (state, np.full(fields[state].shape, np.nan)),
                (state, np.full(fields[state].shape, 1e300)),
                (state, np.zeros(99)),
                (prompt, "x" * 5000),
                (prompt, 7),
                (self.random.randbytes(4).hex(), 1),
            )
        )
        self.send(self.packed(fields | {key: value}))

    def wrong_chunk(self) -> None:
        """A message that is right but for what it says of the previous chunk."""
        left, delay, horizon = "prev_chunk_left_over", "inference_delay", "execution_horizon"
        shapes = (0, self.action), (9999, self.action), (2, self.action + 1), (2,), (1, 2, self.action)
        wrong: list[tuple[str, Any]] = [(left, self.parts(np.zeros(shape))) for shape in shapes]
        wrong += [(left, self.parts(np.full((2, self.action), value))) for value in (np.nan, np.inf, 1e300)]
        wrong += [(left, self.parts(np.zeros((2, self.action), dtype))) for dtype in (np.int64, np.float16, np.bool_)]
        wrong += [(left, value) for value in (None, 3, "x", [[0.0] * self.action], {}, {"action": 1})]
        wrong += [(delay, value) for value in (-1, 3, 2**63, 0.5, float("nan"), True, None, "1", [1], {})]
        wrong += [(horizon, value) for value in (0, -1, 2**63, 1.5, False, "2")]
        fields = self.continuing() | dict([self.random.choice(wrong)])
        if self.random.random() < 0.2:
            del fields[self.random.choice((left, delay))]
        self.send(self.packed(fields))

    def too_large(self) -> None:
        self.send(b"\x00" * self.random.choice((200_000, 3_000_000)))

    def half_open(self) -> None:
        """Sockets that say nothing, or half of what they should."""
        beginning = self.random.choice((b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\xff\x00\x00"))
        self.hold(self.raw(beginning), shaken=False)

    def slow_writer(self) -> None:
        """A frame that is announced and does not come."""
        self.hold(self.framed(self.right()[:1000], announced=50_000))

    def never_reads(self) -> None:
        """Right messages, one after the other, whose answers nobody takes."""
        message = self.right()
        self.hold(self.framed(message, announced=len(message), times=2))

    def fields(self) -> dict[str, Any]:
        """Of a right message; the state and the prompt are the last."""
        images = {name: np.zeros((self.size, self.size, 3), np.uint8) for name in ("back", "front")}
        if self.protocol == "openpi":
            keyed = {f"observation/{name}": image for name, image in images.items()}
            return {**keyed, "observation/state": np.zeros(self.state), "prompt": "Open a drawer"}
        keyed = {f"video.{name}": image[None] for name, image in images.items()}
        return {**keyed, "state.state": np.zeros((1, self.state)), _PROMPT: ["Open a drawer"]}

    def continuing(self) -> dict[str, Any]:
        """Of a right message with what is left of a chunk."""
        left = self.parts(np.zeros((2, self.action)))
        return {"prev_chunk_left_over": left, "inference_delay": 1, **self.fields()}

    def parts(self, actions: np.ndarray) -> Any:
        """Actions as the protocol sends them."""
        return actions if self.protocol == "openpi" else {"action.action": actions}

    def right(self) -> bytes:
        return self.packed(self.random.choice((self.fields, self.continuing))())

    def packed(self, fields: dict[str, Any]) -> bytes:
        if self.protocol == "openpi":
            return msgpack_numpy.packb(fields)
        return msgpack.packb({"endpoint": "get_action", "data": _packed_for_groot(fields)})

    def send(self, message: bytes) -> None:
        """Send a whole message as a client does, and wait for what it is answered with."""
        try:
            if self.protocol == "openpi":
                with connect(f"ws://{HOST}:{self.port}", compression=None, close_timeout=1) as connection:
                    connection.recv(timeout=5)
                    connection.send(message)
                    connection.recv(timeout=5)
            else:
                self._framed_and_answered(message)
        except (WebSocketException, OSError, TimeoutError):
            pass  # which is what such a client deserves

    def _framed_and_answered(self, message: bytes) -> None:
        with self.framed(message, announced=len(message)) as raw:
            raw.settimeout(2)
            answer = b""
            while b"error" not in answer and b"action.action" not in answer:
                piece = raw.recv(65536)
                if not piece:
                    return
                answer += piece

    def raw(self, beginning: bytes) -> socket.socket:
        raw = socket.create_connection((HOST, self.port), timeout=5)
        raw.sendall(beginning)
        return raw

    def framed(self, message: bytes, announced: int, times: int = 1) -> socket.socket:
        """A client below the level of its library, which announces so many bytes and sends those of the message."""
        if self.protocol == "openpi":
            raw = self.raw(
                b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            header = b"\x82\xff" + struct.pack(">Q", announced) + bytes(4)
        else:
            raw = self.raw(b"\xff" + bytes(7) + b"\x01\x7f\x03\x01NULL" + bytes(48))
            raw.recv(64)  # libzmq gives up on peers that do not wait for its greeting
            raw.sendall(b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ")
            header = b"\x01\x00\x02" + struct.pack(">Q", announced)
        raw.settimeout(0.5)
        try:
            for _ in range(times):
                raw.sendall(header + message)
        except OSError:
            pass  # the server takes no more, or has closed
        return raw

    def hold(self, raw: socket.socket, shaken: bool = True) -> None:
        """Keep a socket open, before or after the handshake; the oldest is closed when there are too many."""
        self.held[shaken].append(raw)
        if len(self.held[shaken]) > HELD_AT_ONCE[shaken]:
            self.held[shaken].pop(0).close()

    def let_go(self) -> None:
        """Close all sockets that are held."""
        for raw in [*self.held[False], *self.held[True]]:
            raw.close()


class Good:
    """A client that stays connected and must be answered whatever the others do."""

    def __init__(self, attacker: Attacker) -> None:
        self.attacker, self.seconds = attacker, list[float]()
        if attacker.protocol == "openpi":
            self.client = WebsocketClientPolicy(HOST, attacker.port)
        else:
            self.socket = zmq.Context.instance().socket(zmq.REQ)
            self.socket.setsockopt(zmq.RCVTIMEO, 1000 * PATIENCE)
            self.socket.setsockopt(zmq.LINGER, 0)
            self.socket.connect(f"tcp://{HOST}:{attacker.port}")

    def ask(self) -> None:
        """Raises if it gets no actions."""
        started = time.monotonic()
        if self.attacker.protocol == "openpi":
            late = threading.Timer(PATIENCE, self.close)  # this client waits for ever
            late.daemon = True
            late.start()
            fields = self.attacker.random.choice((self.attacker.fields, self.attacker.continuing))()
            actions = self.client.infer(fields)["actions"]
            late.cancel()
            assert actions.ndim == 2 and np.isfinite(actions).all()
        else:
            self.socket.send(self.attacker.right())
            answer = msgpack.unpackb(self.socket.recv())
            assert "action.action" in answer, answer
        self.seconds.append(time.monotonic() - started)

    def close(self) -> None:
        if self.attacker.protocol == "openpi":
            self.client._ws.close()
        else:
            self.socket.close()


def _packed_for_groot(fields: dict[str, Any]) -> dict[str, Any]:
    def packed(value: Any) -> Any:
        if isinstance(value, dict):
            return _packed_for_groot(value)
        return packed_for_groot(value) if isinstance(value, np.ndarray) else value

    return {key: packed(value) for key, value in fields.items()}


def serve(checkpoint: Path, protocol: str, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A server on a free port, once it listens; its lines go to `log`."""
    with socket.create_server((HOST, 0)) as free, socket.create_server((HOST, 0)) as other:
        port, metrics = free.getsockname()[1], other.getsockname()[1]
    command = Path(sys.executable).with_name("omega-qvla")
    arguments = ["serve", checkpoint, "--protocol", protocol, "--port", port, "--metrics-port", metrics]
    with log.open("wb") as lines:
        process = subprocess.Popen([str(part) for part in (command, *arguments)], stderr=lines)
    while "health and metrics" not in log.read_text():
        if process.poll() is not None:
            raise RuntimeError(f"the server did not start: {log.read_text()}")
        time.sleep(0.1)
    return process, port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=("openpi", "groot"), default="openpi")
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=api.bundled_checkpoint())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        process, port = serve(options.checkpoint, options.protocol, log)
        try:
            print(json.dumps(run(process, Attacker(options.protocol, port, options.seed), options.messages)))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        assert process.returncode == 0 and "Traceback" not in log.read_text(), log.read_text()[-2000:]


def run(process: subprocess.Popen[bytes], attacker: Attacker, messages: int) -> dict[str, Any]:
    """Attack; returns the figures. Raises if the good client was not answered."""
    server, done, started = psutil.Process(process.pid), Counter[str](), time.monotonic()
    good = Good(attacker)
    for _ in range(5):
        good.ask()
    calm, before, most = list(good.seconds), server.memory_info().rss, 0
    for count in range(1, messages + 1):
        done[attacker.attack()] += 1
        if count % GOOD_EVERY == 0:
            good.ask()
            most = max(most, server.memory_info().rss)
            if count % 1000 == 0:
                print(f"{count}: {most / 2**20:.1f} MiB at most, files open {server.num_fds()}", flush=True)
    attacker.let_go()
    good.ask()
    after = server.memory_info().rss
    figures = {
        "protocol": attacker.protocol,
        "attacks": dict(done),
        "seconds": round(time.monotonic() - started, 1),
        "resident_mib": {
            name: round(v / 2**20, 1) for name, v in (("before", before), ("most", most), ("after", after))
        },
        "good_client": {
            "answered": len(good.seconds),
            "calm_ms": round(1000 * float(np.median(calm)), 1),
            "p50_ms": round(1000 * float(np.median(good.seconds)), 1),
            "max_ms": round(1000 * max(good.seconds), 1),
        },
    }
    return figures


if __name__ == "__main__":
    main()
