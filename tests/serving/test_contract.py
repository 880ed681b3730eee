"""An observation is exactly what the policy declares, or a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from running import INTERFACE

from omega_qvla.policy import Interface
from omega_qvla.serving import groot, openpi
from omega_qvla.serving.contract import Contract, keys_with
from omega_qvla.serving.limits import Limits
from omega_qvla.serving.refusal import Refusal
from omega_qvla.serving.wire import described_by_groot, described_by_openpi, packed_for_groot, packed_for_openpi

LIMITS = Limits(image_pixels=100, prompt_characters=10)
PACKED = packed_for_openpi


def fields(changes: Mapping[Any, Any] = {}, **more: Any) -> dict[Any, Any]:
    """A right message but for the changes, of which `...` takes a field away."""
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    right = {
        "observation/back": PACKED(image),
        "observation/front": PACKED(255 - image),
        "observation/state": PACKED(np.array([0.25, -1.5])),
        "prompt": "go",
    }
    return {key: value for key, value in (right | dict(changes) | more).items() if value is not ...}


def contract(interface: Interface = INTERFACE, **options: Any) -> Contract:
    return Contract(interface, keys_with(openpi.default_keys(interface), **options), LIMITS, described_by_openpi)


def test_a_right_message_is_an_observation_of_one() -> None:
    observation = contract().observation(fields())
    assert list(observation.images) == ["back", "front"] and observation.instructions == ("go",)
    assert observation.images["back"].shape == (1, 8, 8, 3) and observation.images["back"][0, 0, 0, 1] == 1
    assert observation.state.dtype == np.float32
    np.testing.assert_array_equal(observation.state, [[0.25, -1.5]])


@pytest.mark.parametrize(
    ("changes", "reason", "sentence"),
    [
        ({"prompt": ...}, "fields", "'prompt' is missing"),
        ({"observation/front": ...}, "fields", "'observation/front' is missing"),
        ({"more": 1}, "fields", "'more' is unknown"),
        ({b"prompt": "go"}, "fields", "'prompt' is unknown"),
        ({"prompt": 3}, "fields", "no text"),
        ({"prompt": "g" * 11}, "size", "more than 10 characters"),
        ({"prompt": ["go", "on"]}, "fields", "no text"),
        ({"observation/back": [1, 2]}, "array", "'observation/back' is no array"),
        ({"observation/back": PACKED(np.zeros((8, 9, 3), np.uint8))}, "array", r"send \[8, 8, 3\]"),
        ({"observation/back": PACKED(np.full((8, 8, 3), np.nan, np.float32))}, "array", "send uint8"),
        ({"observation/state": PACKED(np.zeros(3))}, "array", r"shape \[3\]; send \[2\]"),
        ({"observation/state": PACKED(np.zeros(2, np.int64))}, "array", "float32 or float64"),
        ({"observation/state": PACKED(np.array([0, np.nan]))}, "values", "NaN"),
        ({"observation/state": PACKED(np.array([0, -np.inf], np.float32))}, "values", "infinity"),
        ({"observation/state": PACKED(np.array([0, 1e300]))}, "values", "float32"),
    ],
)
def test_what_is_not_declared_is_refused(changes: dict[Any, Any], reason: str, sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence) as refused:
        contract().observation(fields(changes))
    assert refused.value.reason == reason


def test_cameras_and_states_come_under_the_keys_that_are_stated() -> None:
    mapped = contract(cameras=["back=image"], state=["joints", "gripper"], prompt="task")
    message = fields(
        {"observation/back": ..., "observation/state": ..., "prompt": ...},
        image=PACKED(np.full((8, 8, 3), 9, np.uint8)),
        joints=PACKED(np.array([1.0])),
        gripper=PACKED(np.array([2.0], np.float32)),
        task="go",
    )
    observation = mapped.observation(message)
    assert (observation.images["back"] == 9).all()
    np.testing.assert_array_equal(observation.state, [[1, 2]])
    with pytest.raises(Refusal, match=r"joints \+ gripper has 2 numbers"):
        mapped.observation(message | {"joints": PACKED(np.zeros(2))})
    with pytest.raises(Refusal, match=r"'gripper' has shape \[2\]; send \[1\]"):
        mapped.observation(message | {"gripper": PACKED(np.zeros(2))})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cameras": ["wrist=image"]}, "no camera 'wrist'; the policy has back, front"),
        ({"cameras": ["back"]}, "CAMERA=KEY"),
        ({"cameras": ["back=a", "back=b"]}, "CAMERA=KEY"),
        ({"cameras": ["back=observation/front"]}, "'observation/front' stands for two things"),
        ({"state": ["prompt"]}, "'prompt' stands for two things"),
    ],
)
def test_a_wrong_mapping_is_an_error_before_anything_runs(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        contract(**options)


def test_images_of_any_size_stay_within_the_limit() -> None:
    any_size = contract(Interface({"back": None}, {"state": 2}, {"action": 2}))
    message = fields({"observation/front": ...})
    for shape in ((8, 8, 3), (1, 100, 3)):
        message["observation/back"] = PACKED(np.zeros(shape, np.uint8))
        assert any_size.observation(message).images["back"].shape == (1, *shape)
    for shape, sentence in (((11, 10, 3), "more than 100 pixels"), ((8, 8), "no shape of an image")):
        message["observation/back"] = PACKED(np.zeros(shape, np.uint8))
        with pytest.raises(Refusal, match=sentence):
            any_size.observation(message)
    huge = PACKED(np.zeros((1, 1, 3), np.uint8)) | {b"shape": [2**40, 2**40, 3]}
    with pytest.raises(Refusal, match="pixels"):
        any_size.observation(message | {"observation/back": huge})


def test_the_largest_right_message_fits() -> None:
    assert 2 * 192 + 16 < contract().message_bytes < 20_000


def test_groots_fields_have_a_moment_in_time() -> None:
    interface = Interface({"back": (8, 8)}, {"arm": 2, "gripper": 1}, {"arm": 3, "gripper": 1})
    keys = groot.default_keys(interface)
    assert keys.state == ("state.arm", "state.gripper")
    timed = Contract(interface, keys, LIMITS, described_by_groot, time_axis=True)
    message = {
        "video.back": packed_for_groot(np.zeros((1, 8, 8, 3), np.uint8)),
        "state.arm": packed_for_groot(np.array([[1.0, 2.0]])),
        "state.gripper": packed_for_groot(np.array([[3.0]])),
        "annotation.human.action.task_description": ["go"],
    }
    observation = timed.observation(message)
    assert observation.images["back"].shape == (1, 8, 8, 3) and observation.instructions == ("go",)
    np.testing.assert_array_equal(observation.state, [[1, 2, 3]])
    with pytest.raises(Refusal, match=r"shape \[8, 8, 3\]; send \[1, 8, 8, 3\]"):
        timed.observation(message | {"video.back": packed_for_groot(np.zeros((8, 8, 3), np.uint8))})


@pytest.mark.parametrize("stated", [["a=3"], ["a=x"], ["a"], ["a=1", "a=1"], ["a=0", "b=2"]])
def test_parts_of_an_action_make_up_an_action(stated: list[str]) -> None:
    with pytest.raises(ValueError, match="part"):
        groot.action_keys(INTERFACE, stated)
    assert groot.action_keys(INTERFACE, ["action.x=1", "action.y=1"]) == {"action.x": 1, "action.y": 1}
