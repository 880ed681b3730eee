"""The observations and the noise that a policy is calibrated with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from omega_qvla.policy import Observation, Policy

BATCH = 8
"""Observations in an inference of a policy that is resident in memory."""


def calibration_batches(
    policy: Policy, observations: Observation, noise_seed: int, size: int = BATCH
) -> Iterator[tuple[Observation, Tensor]]:
    """All observations in order, `size` at a time, each with its initial noise [batch, *noise_shape]."""
    for start in range(0, len(observations), size):
        batch = observations[start : start + size]
        yield batch, calibration_noise(policy, noise_seed, start, len(batch))


def calibration_noise(policy: Policy, seed: int, first: int, count: int) -> Tensor:
    """Initial noise [count, *noise_shape] of observations first ... first + count - 1.

    The noise of an observation depends on the seed and its number alone.
    """
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + first + i) for i in range(count)]
    return torch.stack([torch.randn(policy.noise_shape, generator=generator) for generator in generators])
