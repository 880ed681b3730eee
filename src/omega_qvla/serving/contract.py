"""What an observation must be before anything is made of it: exactly what the policy declares, under stated keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omega_qvla.policy import Interface, Observation, PreviousChunk
from omega_qvla.serving import chunking
from omega_qvla.serving.limits import Limits
from omega_qvla.serving.refusal import Refusal
from omega_qvla.serving.wire import FLOATS, DescribedArray, array, shown

_OVERHEAD = 16 * 1024
"""Bytes of a message besides pixels, state and prompt: keys, headers, a token."""


@dataclass(frozen=True)
class Request:
    """What a client asks the policy."""

    observation: Observation
    previous: PreviousChunk | None = None
    """What is left of its last chunk; None: it does no real-time chunking, or has no chunk yet."""


@dataclass(frozen=True)
class Keys:
    """Under which keys a client sends what the policy takes."""

    cameras: Mapping[str, str]
    """Camera of the policy to key."""
    state: tuple[str, ...]
    """Keys whose numbers, one after the other, are the state."""
    prompt: str

    def all(self) -> tuple[str, ...]:
        return (*self.cameras.values(), *self.state, self.prompt)


def keys_with(default: Keys, cameras: Sequence[str] = (), state: Sequence[str] = (), prompt: str = "") -> Keys:
    """`default` but for what is stated: CAMERA=KEY for single cameras, the keys of the state, that of the prompt.

    Raises `ValueError` for a camera that the policy lacks, what is no CAMERA=KEY, or a key that is used twice.
    """
    stated: dict[str, str] = {}
    for option in cameras:
        name, equals, key = option.partition("=")
        if not equals or not key or name in stated:
            raise ValueError(f"{option!r} names no camera, or one again; write CAMERA=KEY once for each camera")
        if name not in default.cameras:
            raise ValueError(f"there is no camera {name!r}; the policy has {', '.join(default.cameras)}")
        stated[name] = key
    keys = Keys({**default.cameras, **stated}, tuple(state) or default.state, prompt or default.prompt)
    if twice := [key for key in keys.all() if [*keys.all(), *chunking.KEYS].count(key) > 1]:
        raise ValueError(f"the key {twice[0]!r} stands for two things; give each its own")
    return keys


class Contract:
    """Makes requests of the fields of a message.

    `described`: what a protocol's map says of an array. `time_axis`: whether images and states come with a leading
    axis of length 1, the moments in time. `action_parts`: keys and widths of the arrays in which actions are sent;
    None: it is one.
    """

    def __init__(
        self,
        interface: Interface,
        keys: Keys,
        limits: Limits,
        described: Callable[[object], DescribedArray | None],
        *,
        time_axis: bool = False,
        action_parts: Mapping[str, int] | None = None,
    ) -> None:
        self.interface, self.keys = interface, keys
        self._chunks = chunking.PreviousChunks(interface, described, action_parts)
        self._limits, self._described, self._lead = limits, described, (1,) if time_axis else ()

    @property
    def message_bytes(self) -> int:
        """The size of the largest message that can be right."""
        pixels = sum(self._pixels(size) for size in self.interface.cameras.values())
        numbers = 8 * self.interface.state_width + self._chunks.message_bytes
        return 3 * pixels + numbers + 4 * self._limits.prompt_characters + _OVERHEAD

    def request(self, fields: Mapping[Any, Any]) -> Request:
        """An observation, with what is left of the last chunk if the client sent it. Raises `Refusal`."""
        observed = {key: value for key, value in fields.items() if key not in chunking.KEYS}
        return Request(self.observation(observed), self._chunks.previous(fields))

    def observation(self, fields: Mapping[Any, Any]) -> Observation:
        """One observation. Raises `Refusal` for a field that is missing, unknown or not as the policy declares it."""
        expected = self.keys.all()
        if missing := [key for key in expected if key not in fields]:
            raise Refusal("fields", f"{missing[0]!r} is missing; send {', '.join(expected)}")
        if unknown := [key for key in fields if key not in expected]:
            raise Refusal("fields", f"{shown(unknown[0])} is unknown; send {', '.join(expected)} and nothing else")
        images = {camera: self._image(camera, fields[key]) for camera, key in self.keys.cameras.items()}
        return Observation(images, self._state(fields), (self._prompt(fields[self.keys.prompt]),))

    def _image(self, camera: str, value: object) -> np.ndarray:
        key, size = self.keys.cameras[camera], self.interface.cameras[camera]
        described = self._array(value, key)
        shape = (*self._lead, *(size or self._any_size(described.shape, key)), 3)
        return array(described, ("|u1",), shape, f"the image {key!r}").reshape(1, *shape[-3:])

    def _any_size(self, shape: object, key: str) -> tuple[int, int]:
        """Height and width of an image that may have any, which is as a shape states them."""
        if isinstance(shape, list | tuple) and len(shape) == len(self._lead) + 3:
            height, width = shape[-3], shape[-2]
            if type(height) is int and type(width) is int and min(height, width) > 0:
                if height * width <= self._limits.image_pixels:
                    return height, width
                raise Refusal(
                    "size", f"the image {key!r} has more than {self._limits.image_pixels} pixels; send smaller ones"
                )
        lead = ", ".join([*map(str, self._lead), "height", "width", "3"])
        raise Refusal("array", f"the image {key!r} has no shape of an image; send [{lead}]")

    def _state(self, fields: Mapping[Any, Any]) -> np.ndarray:
        """float32 [1, D] of one or several vectors."""
        parts, left = [], self.interface.state_width
        for index, key in enumerate(self.keys.state):
            described, others = self._array(fields[key], key), len(self.keys.state) - index - 1
            length = left if others == 0 else self._length(described.shape, left - others, key)
            parts.append(array(described, FLOATS, (*self._lead, length), f"the state {key!r}").reshape(-1))
            left -= length
        with np.errstate(over="ignore"):
            state = np.concatenate(parts).astype(np.float32)[None]
        if not np.isfinite(state).all():
            raise Refusal("values", "the state contains NaN or infinity, or more than float32 holds; mend the sensor")
        return state

    def _length(self, shape: object, most: int, key: str) -> int:
        """Of a vector that is followed by others, which is as its shape states it."""
        length = shape[-1] if isinstance(shape, list | tuple) and len(shape) == len(self._lead) + 1 else None
        if type(length) is not int or not 0 < length <= most:
            whole = f"{' + '.join(self.keys.state)} has {self.interface.state_width} numbers"
            raise Refusal("array", f"the state {key!r} is no vector of 1 to {most} numbers; the whole state {whole}")
        return length

    def _array(self, value: object, key: str) -> DescribedArray:
        described = self._described(value)
        if described is None:
            raise Refusal("array", f"{key!r} is no array; send a NumPy array")
        return described

    def _prompt(self, value: object) -> str:
        text = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(text, str):
            raise Refusal("fields", f"{self.keys.prompt!r} is no text; send one sentence")
        if len(text) > self._limits.prompt_characters:
            raise Refusal(
                "size", f"{self.keys.prompt!r} has more than {self._limits.prompt_characters} characters; shorten it"
            )
        return text

    def _pixels(self, size: tuple[int, int] | None) -> int:
        return self._limits.image_pixels if size is None else size[0] * size[1]
