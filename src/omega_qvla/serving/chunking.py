"""What a client sends for real-time chunking: what is left of the last chunk, and how much of it will be executed
until the next one is there. The names are lerobot's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from omega_qvla.policy import Interface, PreviousChunk
from omega_qvla.serving.refusal import Refusal
from omega_qvla.serving.wire import FLOATS, DescribedArray, array

LEFT_OVER = "prev_chunk_left_over"
DELAY = "inference_delay"
HORIZON = "execution_horizon"
KEYS = (LEFT_OVER, DELAY, HORIZON)


class PreviousChunks:
    """Makes previous chunks of the fields of a message.

    `described`: what a protocol's map says of an array. `parts`: keys and widths of the arrays in which actions are
    sent, and come back; None: it is one array.
    """

    def __init__(
        self,
        interface: Interface,
        described: Callable[[object], DescribedArray | None],
        parts: Mapping[str, int] | None,
    ) -> None:
        self._most, self._width = interface.previous_actions, interface.action_width
        self._described, self._parts = described, parts

    @property
    def message_bytes(self) -> int:
        """Of the actions in the largest message that can be right."""
        return 8 * self._most * self._width

    def previous(self, fields: Mapping[Any, Any]) -> PreviousChunk | None:
        """None if nothing of it was sent. Raises `Refusal` if the policy takes none, or takes it otherwise."""
        sent = [key for key in KEYS if key in fields]
        if not sent:
            return None
        if not self._most:
            raise Refusal(
                "fields",
                f"this policy continues no previous chunk; leave {sent[0]!r} out, and execute each chunk as it is",
            )
        if missing := [key for key in (LEFT_OVER, DELAY) if key not in fields]:
            raise Refusal("fields", f"{missing[0]!r} is missing; send {LEFT_OVER} and {DELAY} together, or neither")
        actions = self._actions(fields[LEFT_OVER])
        delay = _whole(fields[DELAY], DELAY, 0, actions.shape[1])
        horizon = _whole(fields[HORIZON], HORIZON, max(1, delay), self._most) if HORIZON in fields else None
        return PreviousChunk(actions, delay, horizon)

    def _actions(self, value: object) -> np.ndarray:
        """float32 [1, T, D] of one or several arrays of equal length."""
        if self._parts is None:
            read = self._array(value, LEFT_OVER, self._width, None)
        elif isinstance(value, dict) and value.keys() == self._parts.keys():
            parts: list[np.ndarray] = []
            for key, width in self._parts.items():
                parts.append(self._array(value[key], key, width, len(parts[0]) if parts else None))
            read = np.concatenate(parts, axis=-1)
        else:
            raise Refusal("fields", f"{LEFT_OVER!r} is no map of {', '.join(self._parts)}; send what is left of each")
        with np.errstate(over="ignore"):
            actions = read.astype(np.float32)[None]
        if not np.isfinite(actions).all():
            raise Refusal(
                "values",
                f"{LEFT_OVER!r} contains NaN or infinity, or more than float32 holds; send actions as they came",
            )
        return actions

    def _array(self, value: object, key: str, width: int, length: int | None) -> np.ndarray:
        """[T, width], where T is `length`, or else as its shape states it."""
        described = self._described(value)
        if described is None:
            raise Refusal("array", f"{key!r} of the previous chunk is no array; send a NumPy array")
        shape = described.shape
        if length is None:
            length = shape[0] if isinstance(shape, list | tuple) and len(shape) == 2 else None
            if type(length) is not int or not 1 <= length <= self._most:
                raise Refusal(
                    "array",
                    f"{key!r} of the previous chunk has not the shape [1 to {self._most}, {width}]; send the actions "
                    f"that are left, or leave {LEFT_OVER} and {DELAY} out if there are none",
                )
        return array(described, FLOATS, (length, width), f"{key!r} of the previous chunk")


def _whole(value: object, key: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise Refusal("values", f"{key!r} is no whole number of {least} to {most}; count in actions")
    return value
