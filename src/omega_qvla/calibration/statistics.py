"""What the linears of a policy read, gathered while the policy infers.

Statistics stream: Hessians and peaks are accumulated token by token, and of the tokens themselves at most a
fixed number is kept per site and denoising step. Language and vision run once per inference and have no step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omega_qvla.policy import InputSite, Observation, QuantizablePolicy

MAX_SAMPLES = 4096
"""Tokens kept per site and step for percentiles; beyond that, a uniform sample."""
BATCH = 8
"""Observations in an inference of the floating-point policy."""


class CalibrationError(ValueError):
    """Statistics that cannot be had: the message names the site or step and what is wrong."""


@dataclass(frozen=True)
class Needs:
    """Which statistics of a site are wanted; peak and magnitude per channel always are."""

    hessian: bool = False
    samples: bool = False


@dataclass
class SiteStatistics:
    """Of the input X [tokens, in] of one site."""

    name: str
    needs: Needs
    tokens: int = 0
    peak: Tensor | None = None
    """Largest |X_j|, float32 [in]."""
    magnitude: Tensor | None = None
    """Sum of |X_j| over the tokens, float64 [in]."""
    hessian: Tensor | None = None
    """XᵀX, float32 [in, in]."""
    samples: dict[int | None, Tensor] = field(default_factory=dict)
    """Tokens by denoising step, float32 [at most MAX_SAMPLES, in]; step None for parts that have none."""
    seen: dict[int | None, int] = field(default_factory=dict)
    """Tokens seen by denoising step."""

    def add(self, x: Tensor, step: int | None, generator: torch.Generator) -> None:
        """Add tokens x [tokens, in]. Raises `CalibrationError` if they are not finite."""
        if not x.isfinite().all():
            raise CalibrationError(f"the input of {self.name} contains NaN or infinity during calibration")
        self.tokens += len(x)
        size = x.abs()
        peak, magnitude = size.amax(0), size.sum(0, dtype=torch.float64)
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self.magnitude = magnitude if self.magnitude is None else self.magnitude + magnitude
        if self.needs.hessian:
            self.hessian = x.t() @ x if self.hessian is None else self.hessian.addmm_(x.t(), x)
        if self.needs.samples:
            self._sample(x, step, generator)
        self.seen[step] = self.seen.get(step, 0) + len(x)

    def _sample(self, x: Tensor, step: int | None, generator: torch.Generator) -> None:
        """Reservoir sampling (Vitter 1985, algorithm R)."""
        seen = self.seen.get(step, 0)
        room = max(0, MAX_SAMPLES - seen)
        if room:
            kept = self.samples.get(step, x[:0])
            self.samples[step] = torch.cat([kept, x[:room]])
        for offset in range(room, len(x)):
            place = int(torch.randint(seen + offset + 1, (1,), generator=generator))
            if place < MAX_SAMPLES:
                self.samples[step][place] = x[offset]


def collect(
    policy: QuantizablePolicy,
    needs: Mapping[InputSite, Needs],
    observations: Observation,
    *,
    noise_seed: int,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, SiteStatistics]:
    """Run the policy on all observations and gather what each site needs; statistics by the site's name.

    The noise of observation i depends on `noise_seed` and i alone. Raises `CalibrationError` if a site never
    ran, or did not run in every denoising step; `ValueError` if a camera is missing.
    """
    if not len(observations):
        raise CalibrationError("there are no calibration observations")
    statistics = {site.name: SiteStatistics(site.name, need) for site, need in needs.items()}
    with _listening(policy, list(needs), statistics):
        for batch, noise in calibration_batches(policy, observations, noise_seed):
            policy.infer(batch, noise)
            on_batch()
    for site in needs:
        _check_complete(statistics[site.name], site, policy.denoising_steps)
    return statistics


def calibration_batches(
    policy: QuantizablePolicy, observations: Observation, noise_seed: int
) -> Iterator[tuple[Observation, Tensor]]:
    """All observations in order, BATCH at a time, each with its initial noise [batch, *noise_shape]."""
    for start in range(0, len(observations), BATCH):
        batch = observations[start : start + BATCH]
        yield batch, calibration_noise(policy, noise_seed, start, len(batch))


def calibration_noise(policy: QuantizablePolicy, seed: int, first: int, count: int) -> Tensor:
    """Initial noise [count, *noise_shape] of observations first ... first + count - 1."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + first + i) for i in range(count)]
    return torch.stack([torch.randn(policy.noise_shape, generator=generator) for generator in generators])


def _check_complete(statistics: SiteStatistics, site: InputSite, steps: int) -> None:
    if not statistics.tokens:
        raise CalibrationError(f"{site.name} has no statistics: it never ran on the calibration observations")
    if site.part == "action" and (unseen := set(range(steps)) - set(statistics.seen)):
        raise CalibrationError(f"{site.name} has no statistics for denoising step {min(unseen)}: it never ran there")


@contextmanager
def _listening(
    policy: QuantizablePolicy, sites: list[InputSite], statistics: dict[str, SiteStatistics]
) -> Iterator[None]:
    """While open, the first linear of each site reports its input."""
    generator = torch.Generator().manual_seed(0)

    def listener(site: InputSite) -> Callable[..., None]:
        def listen(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            step = policy.step.current if site.part == "action" else None
            statistics[site.name].add(inputs[0].detach().flatten(0, -2).float(), step, generator)

        return listen

    modules = [policy.module.get_submodule(site.linears[0]) for site in sites]
    handles = [m.register_forward_pre_hook(listener(site)) for m, site in zip(modules, sites, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
