"""How an environment tells the policy which noise its episode meets.

lerobot draws noise from torch's global generator, so what an episode meets depends on everything that ran before it.
An environment that names its episodes adds the numbers that ours is drawn from to its observations. lerobot turns
every observation into float32, which holds integers up to 2^24: so a CRC-32 travels as two numbers.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from omega_qvla.evaluation.seeds import episode_key

OBSERVED_AS = "episode_key"
"""The environment's name for it."""
BATCH_KEY = f"observation.{OBSERVED_AS}"
"""Where lerobot then puts it, float32 [B, 3]."""
SHAPE = (3,)
LARGEST = 2**24
_HALF = 2**16


def to_observation(task: str, seed: int) -> np.ndarray:
    """The key of an episode, float32 [3]: seed, upper and lower half of the task's CRC-32."""
    number, crc = episode_key(task, seed)
    return np.array([number, crc // _HALF, crc % _HALF], np.float32)


def from_batch(keys: Tensor) -> list[tuple[int, int]]:
    """The keys of B episodes, from float32 [B, 3].

    Raises `ValueError` if they are no such numbers.
    """
    rows = keys.tolist()
    for row in rows:
        if len(row) != SHAPE[0] or not all(number.is_integer() and 0 <= number < LARGEST for number in row):
            raise ValueError(f"{BATCH_KEY} has {row} for an episode instead of its seed and task as three integers")
    return [(int(seed), int(upper) * _HALF + int(lower)) for seed, upper, lower in rows]
