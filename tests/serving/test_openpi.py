"""openpi's protocol with openpi's own client, and with clients that are none."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
import torch
import websockets
from line_world import NOISE_SHAPE
from openpi_client import msgpack_numpy
from running import QUICK, Declared, Running, observation, running, settings, until
from websockets.sync.client import connect

from omega_qvla.policy import Observation
from omega_qvla.serving import openpi
from omega_qvla.serving.contract import keys_with

TOKEN = "a-token-of-many-letters"


@pytest.fixture(scope="module")
def policy() -> Declared:
    return Declared()


@pytest.fixture(scope="module")
def server(policy: Declared) -> Iterator[Running]:
    with running(policy, settings()) as server:
        yield server


def test_the_client_gets_what_the_policy_says(server: Running, policy: Declared) -> None:
    client = server.client()
    metadata = client.get_server_metadata()
    assert metadata["cameras"] == {"observation/back": [8, 8, 3], "observation/front": [8, 8, 3]}
    assert metadata["actions"] == {"chunk": 4, "dimension": 2} and metadata["execute_steps"] == 2
    answer = client.infer(observation(shade=5))
    assert answer["actions"].shape == (4, 2) and answer["actions"].dtype == np.float32
    assert answer["server_timing"]["infer_ms"] >= 0
    seen = policy.seen[-1]
    assert (seen.images["back"] == 5).all() and seen.instructions == ("go",)
    np.testing.assert_array_equal(seen.state, [[0.5, -0.25]])
    client._ws.close()


def test_one_seed_gives_the_same_actions_again() -> None:
    states = [np.array([0.1 * i, -0.2]) for i in range(3)]
    answers = []
    for seed in (3, 3, 4):
        with running(Declared(), settings(noise_seed=seed)) as server:
            client = server.client()
            answers.append([client.infer(observation(**{"observation/state": s}))["actions"] for s in states])
    np.testing.assert_array_equal(answers[0], answers[1])
    assert not np.array_equal(answers[0], answers[2])
    generator, expected = torch.Generator().manual_seed(3), []
    for state in states:
        noise = torch.randn(1, *NOISE_SHAPE, generator=generator)
        expected.append(Declared().infer(Observation({}, state.astype(np.float32)[None], ("go",)), noise)[0])
    np.testing.assert_array_equal(answers[0], expected)


def _refused(server: Running, message: bytes | str) -> str:
    """What a message is answered with, by a text and close code 1011."""
    with connect(f"ws://127.0.0.1:{server.address.port}", compression=None) as connection:
        connection.recv()
        connection.send(message)
        sentence = connection.recv()
        with pytest.raises(websockets.ConnectionClosed):
            connection.recv()
        assert connection.close_code == 1011 and isinstance(sentence, str)
        return sentence


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("text", "binary message"),
        (b"\xc1", "no msgpack"),
        (msgpack.packb({"prompt": "go"}), "'observation/back' is missing"),
        (msgpack_numpy.packb(observation(prompt="fail")), "the log of the server says why"),
        (msgpack_numpy.packb(observation() | {"observation/state": np.array([np.nan, 0])}), "NaN"),
    ],
)
def test_an_error_is_one_sentence(server: Running, message: bytes | str, sentence: str) -> None:
    told = _refused(server, message)
    assert sentence in told and "\n" not in told and "Traceback" not in told and "secret" not in told
    assert server.ask().shape == (4, 2)


def test_a_message_that_is_too_large_is_not_read(server: Running) -> None:
    before = server.metric('refused_total{reason="size"}')
    with connect(f"ws://127.0.0.1:{server.address.port}", compression=None) as connection:
        connection.recv()
        with pytest.raises(websockets.ConnectionClosed):
            connection.send(b"x" * 1_000_000)
            connection.recv()
    until(lambda: server.metric('refused_total{reason="size"}') == before + 1)  # it counts after it has closed


def test_health_and_metrics_are_on_the_same_port(server: Running) -> None:
    assert server.page("/healthz") == "OK\n"
    server.ask()
    for name in ("inference", "answer"):
        values = [server.metric(f'{name}_seconds{{quantile="{q}"}}') for q in (0.5, 0.95, 0.99)]
        assert values == sorted(values) and values[0] > 0
    assert server.metric("queue_depth") == 0 and server.metric("answered_total") >= 1


def test_web_pages_are_not_let_in(server: Running) -> None:
    with pytest.raises(websockets.InvalidStatus, match="403"):
        connect(f"ws://127.0.0.1:{server.address.port}", origin="http://example.org")  # type: ignore[arg-type]


def test_keys_are_those_that_were_stated(policy: Declared) -> None:
    keys = keys_with(openpi.default_keys(policy.interface()), ["back=image"], ["state"], "task")
    with running(policy, settings(keys=keys)) as server:
        plain = observation()
        sent = {"image": plain["observation/back"], "observation/front": plain["observation/front"]}
        client = server.client()
        assert client.infer(sent | {"state": plain["observation/state"], "task": "go"})["actions"].shape == (4, 2)
        with pytest.raises(RuntimeError, match="'image' is missing"):
            client.infer(plain)


def test_who_has_no_token_learns_nothing() -> None:
    with running(Declared(), settings(token=TOKEN.encode())) as server:
        assert server.client(api_key=TOKEN).infer(observation())["actions"].shape == (4, 2)
        for wrong in (None, TOKEN[:-1], TOKEN + "x", "ü"):
            with pytest.raises((websockets.InvalidStatus, UnicodeEncodeError)):
                server.client(api_key=wrong)
        assert server.page("/healthz") == "OK\n"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.page("/metrics")
        assert server.metric('refused_total{reason="token"}', TOKEN) >= 3


def test_a_missed_deadline_is_told_before_the_answer_comes() -> None:
    policy = Declared()
    with running(policy, settings(deadline=0.05)) as server, ThreadPoolExecutor() as pool:
        client = server.client()
        assert client.infer(observation())["server_timing"]["deadline_missed"] is False
        policy.gate.clear()
        late = pool.submit(client.infer, observation())
        until(lambda: server.metric("deadline_misses_total") == 1)
        assert not late.done()
        policy.gate.set()
        timing = late.result(5)["server_timing"]
        assert timing["deadline_missed"] is True and timing["total_ms"] > timing["deadline_ms"] == 50


def test_clients_take_turns_and_who_leaves_loses_its_own() -> None:
    policy = Declared()
    with running(policy, settings()) as server, ThreadPoolExecutor() as pool:
        clients = [server.client() for _ in range(3)]
        policy.gate.clear()
        first = pool.submit(clients[0].infer, observation(prompt="first"))
        until(lambda: len(policy.seen) == 2)  # the first inference of all is the server's own
        clients[1]._ws.send(msgpack_numpy.packb(observation(prompt="second")))
        until(lambda: server.metric("queue_depth") == 1)
        third = pool.submit(clients[2].infer, observation(prompt="third"))
        until(lambda: server.metric("queue_depth") == 2)
        clients[1]._ws.socket.shutdown(socket.SHUT_RDWR)
        until(lambda: server.metric("clients") == 2)
        server.page("/healthz")  # by which time the server has also taken its observation back
        policy.gate.set()
        assert first.result(5)["actions"].shape == third.result(5)["actions"].shape
        assert [seen.instructions[0] for seen in policy.seen[1:]] == ["first", "third"]
        assert server.metric("dropped_total") == 1


def test_connections_are_limited_and_their_places_come_back() -> None:
    with running(Declared(), settings()) as server:
        clients = [server.client() for _ in range(QUICK.connections)]
        with pytest.raises(websockets.InvalidStatus, match="503"):
            server.client()
        assert clients[0].infer(observation())["actions"].shape == (4, 2)
        clients[1]._ws.close()
        until(lambda: server.metric("clients") == QUICK.connections - 1)
        server.client()


def test_sockets_that_say_nothing_make_room_and_end() -> None:
    with running(Declared(), settings()) as server:
        client = server.client()
        silent = [socket.create_connection(("127.0.0.1", server.address.port)) for _ in range(2 * QUICK.handshakes)]
        assert client.infer(observation())["actions"].shape == (4, 2)
        assert server.ask().shape == (4, 2)
        for connection in silent:
            connection.settimeout(5)
            with pytest.raises(ConnectionResetError):
                if not connection.recv(1):
                    raise ConnectionResetError


def test_a_message_in_pieces_must_come_to_an_end() -> None:
    with running(Declared(), settings()) as server:
        with connect(f"ws://127.0.0.1:{server.address.port}", compression=None) as connection:
            connection.recv()

            def pieces() -> Iterator[bytes]:
                while True:
                    time.sleep(0.1)
                    yield b"x"

            with pytest.raises(websockets.ConnectionClosed):
                connection.send(pieces())
        assert server.metric('refused_total{reason="slow"}') == 1
        assert server.ask().shape == (4, 2)


def test_shutting_down_answers_what_runs_and_tells_what_waits() -> None:
    policy = Declared()
    with ThreadPoolExecutor() as pool:
        with running(policy, settings()) as server:
            clients = [server.client() for _ in range(3)]
            policy.gate.clear()
            runs = pool.submit(clients[0].infer, observation())
            until(lambda: len(policy.seen) == 2)
            waits = pool.submit(clients[1].infer, observation())
            until(lambda: server.metric("queue_depth") == 1)
            idle = pool.submit(clients[2]._ws.recv)
            threading.Timer(0.3, policy.gate.set).start()
            server.stop.set()
        assert runs.result(5)["actions"].shape == (4, 2)
        with pytest.raises(RuntimeError, match="shutting down"):
            waits.result(5)
        with pytest.raises(websockets.ConnectionClosed, match="1001"):
            idle.result(5)
