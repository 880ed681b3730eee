"""Real-time chunking over the wire: what is left of the last answer comes back, or a sentence."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import zmq
from openpi_client import msgpack_numpy
from running import INTERFACE, Declared, observation, request, running, settings, until

from omega_qvla.policies import load_policy
from omega_qvla.policy import Interface, Observation, PreviousChunk
from omega_qvla.serving import groot, openpi
from omega_qvla.serving.contract import Contract, keys_with
from omega_qvla.serving.limits import Limits
from omega_qvla.serving.refusal import Refusal
from omega_qvla.serving.shadow import Shadow
from omega_qvla.serving.wire import (
    described_by_groot,
    described_by_openpi,
    packed_for_groot,
    packed_for_openpi,
    unpack,
)

LEFT = np.array([[0.5, -1.0], [2.0, 3.0], [0.0, 0.0]])
PACKED = packed_for_openpi
PROMPT = "annotation.human.action.task_description"


def contract(interface: Interface = INTERFACE) -> Contract:
    return Contract(interface, openpi.default_keys(interface), Limits(), described_by_openpi)


def fields(changes: Mapping[Any, Any] = {}) -> dict[Any, Any]:
    """A right message of openpi's but for the changes, of which `...` takes a field away."""
    right = {key: PACKED(value) if isinstance(value, np.ndarray) else value for key, value in observation().items()}
    right |= {"prev_chunk_left_over": PACKED(LEFT), "inference_delay": 2} | dict(changes)
    return {key: value for key, value in right.items() if value is not ...}


def groots(left: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    images = {f"video.{name}": packed_for_groot(np.zeros((1, 8, 8, 3), np.uint8)) for name in ("back", "front")}
    right = {**images, "state.state": packed_for_groot(np.array([[0.5, -0.25]])), PROMPT: ["go"]}
    if left is None:
        return right
    parts = {key: packed_for_groot(np.ascontiguousarray(value)) for key, value in left.items()}
    return right | {"prev_chunk_left_over": parts, "inference_delay": 1}


# What is right, and what is not


def test_a_right_message_is_a_previous_chunk() -> None:
    found = contract().request(fields())
    assert found.previous is not None and found.previous.actions.dtype == np.float32
    np.testing.assert_array_equal(found.previous.actions, LEFT[None].astype(np.float32))
    assert (found.previous.delay, found.previous.execution_horizon) == (2, None)
    assert found.observation.instructions == ("go",)
    more = {"prev_chunk_left_over": PACKED(LEFT.astype(np.float32)), "inference_delay": 0, "execution_horizon": 4}
    other = contract().request(fields(more)).previous
    assert other is not None and (other.delay, other.execution_horizon) == (0, 4)
    np.testing.assert_array_equal(other.actions, found.previous.actions)
    assert contract().request(fields({"prev_chunk_left_over": ..., "inference_delay": ...})).previous is None


@pytest.mark.parametrize(
    ("changes", "reason", "sentence"),
    [
        ({"inference_delay": ...}, "fields", "'inference_delay' is missing; send prev_chunk_left_over and"),
        ({"prev_chunk_left_over": ...}, "fields", "'prev_chunk_left_over' is missing"),
        ({"prev_chunk_left_over": ..., "inference_delay": ..., "execution_horizon": 2}, "fields", "is missing"),
        ({"prev_chunk_left_over": [[1.0, 2.0]]}, "array", "is no array"),
        ({"prev_chunk_left_over": None}, "array", "is no array"),
        ({"prev_chunk_left_over": PACKED(LEFT.astype(np.int64))}, "array", "float32 or float64"),
        ({"prev_chunk_left_over": PACKED(LEFT[0])}, "array", r"not the shape \[1 to 4, 2\]"),
        ({"prev_chunk_left_over": PACKED(LEFT[None])}, "array", r"not the shape \[1 to 4, 2\]"),
        ({"prev_chunk_left_over": PACKED(LEFT[:0])}, "array", "out if there are none"),
        ({"prev_chunk_left_over": PACKED(np.zeros((5, 2)))}, "array", r"not the shape \[1 to 4, 2\]"),
        ({"prev_chunk_left_over": PACKED(np.zeros((3, 3)))}, "array", r"send \[3, 2\]"),
        ({"prev_chunk_left_over": PACKED(LEFT) | {b"shape": [2**40, 2]}}, "array", "not the shape"),
        ({"prev_chunk_left_over": PACKED(LEFT) | {b"shape": [True, 2]}}, "array", "not the shape"),
        ({"prev_chunk_left_over": PACKED(LEFT) | {b"data": b""}}, "array", "bytes"),
        ({"prev_chunk_left_over": PACKED(LEFT * np.nan)}, "values", "NaN"),
        ({"prev_chunk_left_over": PACKED(LEFT + 1e300)}, "values", "float32"),
        ({"inference_delay": 4}, "values", "'inference_delay' is no whole number of 0 to 3"),
        ({"inference_delay": -1}, "values", "whole number"),
        ({"inference_delay": 1.0}, "values", "whole number"),
        ({"inference_delay": True}, "values", "whole number"),
        ({"inference_delay": "2"}, "values", "whole number"),
        ({"execution_horizon": 1}, "values", "'execution_horizon' is no whole number of 2 to 4"),
        ({"execution_horizon": 5}, "values", "of 2 to 4"),
        ({b"inference_delay": 1}, "fields", "'inference_delay' is unknown"),
    ],
)
def test_what_is_wrong_is_refused(changes: dict[Any, Any], reason: str, sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence) as refused:
        contract().request(fields(changes))
    assert refused.value.reason == reason


def test_a_policy_without_it_refuses_it() -> None:
    plain = contract(replace(INTERFACE, previous_actions=0))
    for key in ("prev_chunk_left_over", "inference_delay", "execution_horizon"):
        only = fields({"prev_chunk_left_over": ..., "inference_delay": ...}) | {key: 1}
        with pytest.raises(Refusal, match=f"continues no previous chunk; leave '{key}' out"):
            plain.request(only)


def test_the_fields_have_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="'inference_delay' stands for two things"):
        keys_with(openpi.default_keys(INTERFACE), prompt="inference_delay")


def test_groot_gives_actions_back_in_their_parts() -> None:
    parts = {"action.arm": 1, "action.gripper": 1}
    timed = Contract(
        INTERFACE, groot.default_keys(INTERFACE), Limits(), described_by_groot, time_axis=True, action_parts=parts
    )
    left = {"action.arm": LEFT[:, :1], "action.gripper": LEFT[:, 1:].astype(np.float32)}
    message = unpack(request("get_action", groots(left)), Limits())["data"]  # no deeper than messages may be
    found = timed.request(message).previous
    assert found is not None and found.delay == 1
    np.testing.assert_array_equal(found.actions[0], LEFT.astype(np.float32))
    for wrong, sentence in (
        ({"action.arm": LEFT[:, :1]}, "no map of action.arm, action.gripper"),
        (left | {"action.leg": LEFT}, "no map of action.arm, action.gripper"),
        (left | {"action.gripper": LEFT[:2, 1:]}, r"shape \[2, 1\]; send \[3, 1\]"),
        (left | {"action.arm": LEFT}, r"shape \[3, 2\]; send \[3, 1\]"),
    ):
        with pytest.raises(Refusal, match=sentence):
            timed.request(groots(wrong))
    for single in (packed_for_groot(LEFT), 3):
        with pytest.raises(Refusal, match="no map"):
            timed.request(groots(left) | {"prev_chunk_left_over": single})


def test_the_largest_right_message_fits() -> None:
    interface = replace(INTERFACE, actions={"action": 64}, previous_actions=100)
    left = {"prev_chunk_left_over": np.zeros((100, 64)), "inference_delay": 3, "execution_horizon": 4}
    message = msgpack_numpy.packb(observation(prompt="ä" * Limits().prompt_characters) | left)
    assert len(message) <= contract(interface).message_bytes < 2 * len(message)


# In a server


def test_openpis_client_gives_back_what_is_left() -> None:
    served, reference = Declared(gain=0.5), Declared()
    with running(served, settings(), Shadow(reference, served)) as server:
        client = server.client()
        assert client.get_server_metadata()["previous_chunk"] == {
            "actions": {"key": "prev_chunk_left_over", "at_most": 4},
            "delay": "inference_delay",
            "execution_horizon": "execution_horizon",
        }
        first = client.infer(observation())["actions"]
        left = {"prev_chunk_left_over": first[1:], "inference_delay": 2}
        second = client.infer(observation(**left))["actions"]
        np.testing.assert_array_equal(second[:2], first[1:3])
        until(lambda: server.metric("shadow_compared_total") == 2)
        given = reference.continued[-1]
        assert given is not None and given.delay == 2  # full precision continues the same chunk
        np.testing.assert_array_equal(given.actions[0], first[1:])
        with pytest.raises(RuntimeError, match="whole number of 0 to 3"):
            client.infer(observation(**left | {"inference_delay": 4}))


def test_groots_client_gives_back_what_is_left() -> None:
    with running(Declared(), settings("groot")) as server:
        client = zmq.Context.instance().socket(zmq.REQ)
        client.setsockopt(zmq.RCVTIMEO, 5000)
        client.connect(f"tcp://127.0.0.1:{server.address.port}")

        def ask(endpoint: str, data: Any = None) -> dict[str, Any]:
            client.send(request(endpoint, data))
            return msgpack.unpackb(client.recv())

        def actions(answer: dict[str, Any]) -> np.ndarray:
            return np.lib.format.read_array(io.BytesIO(answer["action.action"]["as_npy"]))

        modality = json.loads(ask("get_modality_config")["prev_chunk_left_over"]["as_json"])
        assert modality == {"delta_indices": [0, 1, 2, 3], "modality_keys": ["action.action"]}
        first = actions(ask("get_action", groots()))
        second = actions(ask("get_action", groots({"action.action": first[2:]})))
        np.testing.assert_array_equal(second[:1], first[2:3])
        client.close(linger=0)


def test_a_quantized_policy_is_asked_as_it_would_be_without_a_server(quantized: Callable[[str], Path]) -> None:
    policy = load_policy(quantized("omega-int4"))
    chosen = replace(settings(noise_seed=5), keys=openpi.default_keys(policy.interface()))
    images = {f"observation/{name}": np.full((96, 96, 3), 60, np.uint8) for name in ("back", "front")}
    sent = {**images, "observation/state": np.zeros(4), "prompt": "open the door"}
    with running(policy, chosen) as server:
        client = server.client()
        first = client.infer(sent)["actions"]
        second = client.infer(sent | {"prev_chunk_left_over": first[1:], "inference_delay": 1})["actions"]
    generator = torch.Generator().manual_seed(5)
    _, noise = (torch.randn(1, *policy.noise_shape, generator=generator) for _ in range(2))
    seen = Observation(
        {name: np.full((1, 96, 96, 3), 60, np.uint8) for name in ("back", "front")},
        np.zeros((1, 4), np.float32),
        ("open the door",),
    )
    np.testing.assert_array_equal(policy.infer(seen, noise, PreviousChunk(first[None, 1:], 1))[0], second)
    assert not np.array_equal(policy.infer(seen, noise)[0], second)
