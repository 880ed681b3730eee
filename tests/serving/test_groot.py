"""GR00T's protocol with ZeroMQ's own sockets, which are all that its clients consist of, and with raw ones."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from running import QUICK, Declared, Running, request, running, settings, until

from omega_qvla.serving.wire import packed_for_groot

TOKEN = "a-token-of-many-letters"
PROMPT = "annotation.human.action.task_description"
GREETING = b"\xff" + bytes(7) + b"\x01\x7f\x03\x01NULL" + bytes(48)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"


@pytest.fixture
def policy() -> Declared:
    return Declared()


@pytest.fixture
def server(policy: Declared) -> Iterator[Running]:
    with running(policy, settings("groot")) as server:
        yield server


class Client:
    """What `BaseInferenceClient` of GR00T does."""

    def __init__(self, server: Running, kind: int = zmq.REQ) -> None:
        self.socket = zmq.Context.instance().socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        self.socket.connect(f"tcp://127.0.0.1:{server.address.port}")

    def ask(self, message: bytes) -> dict[str, Any]:
        self.socket.send(message)
        return msgpack.unpackb(self.socket.recv())


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    client = Client(server)
    yield client
    client.socket.close()


def fields(**changes: Any) -> dict[str, Any]:
    images = {f"video.{name}": packed_for_groot(np.full((1, 8, 8, 3), 3, np.uint8)) for name in ("back", "front")}
    state = packed_for_groot(np.array([[0.5, -0.25]]))
    return {**images, "state.state": state, PROMPT: ["go"]} | changes


def test_a_client_gets_actions(client: Client, policy: Declared) -> None:
    assert client.ask(request("ping")) == {"status": "ok", "message": "Server is running"}
    answer = client.ask(request("get_action", fields()))
    assert list(answer) == ["action.action"]
    actions = np.lib.format.read_array(io.BytesIO(answer["action.action"]["as_npy"]))
    assert actions.shape == (4, 2) and actions.dtype == np.float32
    assert (policy.seen[-1].images["front"] == 3).all() and policy.seen[-1].instructions == ("go",)


def test_the_modalities_say_what_to_send(client: Client) -> None:
    answer = client.ask(request("get_modality_config"))
    assert all(config["__ModalityConfig_class__"] for config in answer.values())
    config = {name: json.loads(value["as_json"]) for name, value in answer.items()}
    assert config["video"] == {"delta_indices": [0], "modality_keys": ["video.back", "video.front"]}
    assert config["state"]["modality_keys"] == ["state.state"] and config["language"]["modality_keys"] == [PROMPT]
    assert config["action"] == {"delta_indices": [0, 1, 2, 3], "modality_keys": ["action.action"]}


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (b"\xc1", "no msgpack"),
        (request("kill"), "ping, get_action, get_modality_config"),
        (request("ping", more=1), "no endpoint"),
        (msgpack.packb({"data": {}}), "no endpoint"),
        (request("get_action"), "'data' is no map"),
        (request("get_action", {"observation": {}}), "'video.back' is missing"),
        (request("get_action", fields(**{PROMPT: ["fail"]})), "the log of the server says why"),
        (request("get_action", fields(**{"state.state": packed_for_groot(np.array([[np.nan, 0]]))})), "NaN"),
    ],
    ids=["bytes", "kill", "unknown", "none", "no data", "nested", "failure", "NaN"],
)
def test_an_error_is_one_sentence_and_the_client_goes_on(client: Client, message: bytes, sentence: str) -> None:
    told = client.ask(message)["error"]
    assert sentence in told and "\n" not in told and "secret" not in told
    assert "action.action" in client.ask(request("get_action", fields()))


def test_who_has_no_token_gets_nothing() -> None:
    with running(Declared(), settings("groot", token=TOKEN.encode())) as server:
        client = Client(server)
        assert "action.action" in client.ask(request("get_action", fields(), api_token=TOKEN))
        for wrong in ({}, {"api_token": TOKEN[:-1]}, {"api_token": 3}, {"api_token": "ü"}):
            assert "the token is missing or wrong" in client.ask(request("ping", **wrong))["error"]
        client.socket.close()


def test_a_ping_is_answered_while_the_policy_infers(server: Running, policy: Declared, client: Client) -> None:
    other = Client(server)
    with ThreadPoolExecutor() as pool:
        policy.gate.clear()
        late = pool.submit(client.ask, request("get_action", fields()))
        until(lambda: len(policy.seen) == 2)
        assert other.ask(request("ping"))["status"] == "ok"
        policy.gate.set()
        assert "action.action" in late.result(5)
    other.socket.close()


def test_a_client_has_one_request_at_a_time(server: Running, policy: Declared) -> None:
    """A DEALER can send without waiting; only its own requests suffer."""
    greedy = Client(server, zmq.DEALER)
    policy.gate.clear()
    for _ in range(3):
        greedy.socket.send_multipart([b"", request("get_action", fields())])
    errors = [msgpack.unpackb(greedy.socket.recv_multipart()[1])["error"] for _ in range(2)]
    assert all("one request after the other" in error for error in errors)
    policy.gate.set()
    assert "action.action" in msgpack.unpackb(greedy.socket.recv_multipart()[1])
    greedy.socket.close()


def test_health_and_metrics_have_a_port_of_their_own(server: Running, client: Client) -> None:
    client.ask(request("get_action", fields()))
    assert server.page("/healthz") == "OK\n"
    assert server.metric("answered_total") == 1 and server.metric("clients") == 1


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (GREETING + READY + b"\x02" + (2**40).to_bytes(8, "big"), "size"),
        (GREETING + READY + b"\x00\x00" + b"\x02" + (10**6).to_bytes(8, "big"), "size"),
        (GREETING + READY + b"\x01\x00" * 3, "size"),
        (GREETING + READY + (b"\x01\x00" + b"\x04\x05\x04PING") * 3, "size"),
        (GREETING + READY + b"\x03" + (5000).to_bytes(8, "big"), "size"),
        (GREETING[:10], "slow"),
        (GREETING + READY + b"\x01\x00\x00", "slow"),
    ],
    ids=["huge", "too long", "parts", "parts between commands", "long first part", "no greeting", "no end"],
)
def test_what_breaks_the_rules_of_frames_is_disconnected(server: Running, sent: bytes, reason: str) -> None:
    raw = socket.create_connection(("127.0.0.1", server.address.port))
    raw.settimeout(5)
    for piece in (sent[: len(GREETING)], sent[len(GREETING) :]):
        raw.sendall(piece)  # libzmq gives up on peers that do not wait for its own greeting
        time.sleep(0.1)
    with pytest.raises(ConnectionError):
        while raw.recv(4096):
            pass
        raise ConnectionError
    assert server.metric(f'refused_total{{reason="{reason}"}}') == 1
    client = Client(server)
    assert client.ask(request("ping"))["status"] == "ok"
    client.socket.close()


def test_silent_sockets_make_room(server: Running) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.address.port)) for _ in range(2 * QUICK.handshakes)]
    client = Client(server)
    assert client.ask(request("ping"))["status"] == "ok"
    client.socket.close()
    for raw in silent:
        raw.close()
