"""Whole policies: how long a chunk of actions takes, and in which stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn

from omega_qvla.bench.contenders import OnnxFloat
from omega_qvla.bench.timing import Times, summary, torch_threads
from omega_qvla.policies import open_or_load
from omega_qvla.policies.base import AdaptedPolicy
from omega_qvla.policies.random_observations import random_observations
from omega_qvla.policy import Observation
from omega_qvla.spec import Part


@dataclass(frozen=True)
class Stages:
    """Milliseconds of one inference."""

    before: float
    """Until vision begins: images and prompt are prepared."""
    vision: float
    language: float
    """Of all blocks, and what leads to the first denoising step."""
    steps: tuple[float, ...]
    """Each denoising step."""
    after: float
    """From the last linear of the last step: actions are brought into physical units."""

    @property
    def action(self) -> float:
        return sum(self.steps)

    @property
    def whole(self) -> float:
        return self.before + self.vision + self.language + self.action + self.after


@dataclass(frozen=True)
class PolicyTimes:
    """One policy with one number of threads."""

    label: str
    execution: str
    threads: int
    whole: Times
    stages: dict[str, Times]
    """Of `before`, `vision`, `language`, `action` (all steps), `step` (each of them) and `after`."""
    resident_bytes: int
    """Of parameters, buffers and what is multiplied."""


@dataclass(frozen=True)
class Entry:
    """A policy that is compared."""

    label: str
    directory: Path
    onnx_runtime: tuple[Part, ...] = ()
    """Parts in which ONNX Runtime multiplies in the place of the linears that could be quantized, in float32."""

    def open(self, threads: int) -> AdaptedPolicy:
        policy = open_or_load(self.directory, "integer")
        if self.onnx_runtime:
            _multiply_by_onnx_runtime(policy, self.onnx_runtime, threads)
        return policy


def measure_policies(
    entries: Sequence[Entry],
    threads: Sequence[int],
    *,
    rounds: int,
    warm_up: int = 2,
    on_round: Callable[[int, int], None] = lambda done, of: None,
) -> list[PolicyTimes]:
    """Time policies on the same random observation, one inference of each per round.

    `warm_up`: rounds before those that count. Raises `CheckpointError` if a directory holds no policy, and as
    `random_observations` does.
    """
    if rounds < 1:
        raise ValueError(f"times need at least one round, not {rounds}")
    found: list[PolicyTimes] = []
    for place, count in enumerate(threads):
        with torch_threads(count):
            policies = [entry.open(count) for entry in entries]
            observation = random_observations(policies[0].directory, 1)
            taken: list[list[Stages]] = [[] for _ in policies]
            for number in range(warm_up + rounds):
                for policy, its in zip(policies, taken, strict=True):
                    stages = inference_stages(policy, observation)
                    if number >= warm_up:
                        its.append(stages)
                on_round(place * (warm_up + rounds) + number + 1, len(threads) * (warm_up + rounds))
            for entry, policy, its in zip(entries, policies, taken, strict=True):
                found.append(_times(policy, entry.label, count, its))
            del policies
    return found


def inference_stages(policy: AdaptedPolicy, observation: Observation) -> Stages:
    """One inference, timed. The noise is the same each time."""
    noise = torch.randn(1, *policy.noise_shape, generator=torch.Generator().manual_seed(0))
    with _marks(policy) as marks:
        begun = perf_counter()
        policy.infer(observation, noise)
        ended = perf_counter()
    steps = np.diff([*marks["action"], marks["end"][-1]])
    vision, language, action = marks["vision"][0], marks["language"][0], marks["action"][0]
    points = np.asarray([begun, vision, language, action])
    prepared, seen, read = (float(1000 * part) for part in np.diff(points))
    return Stages(prepared, seen, read, tuple(float(1000 * s) for s in steps), 1000 * (ended - marks["end"][-1]))


class _OnnxLinear(nn.Module):
    """A linear whose product ONNX Runtime makes."""

    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, threads: int) -> None:
        super().__init__()
        self._like = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device="meta")
        self.register_buffer("bias", linear.bias, persistent=False)
        self._multiply = OnnxFloat().prepare(linear.weight.detach().float(), None, threads)

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype without values: model code asks for them."""
        return self._like

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._multiply(x.flatten(0, -2).float().contiguous()).view(*x.shape[:-1], -1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def _multiply_by_onnx_runtime(policy: AdaptedPolicy, parts: Collection[Part], threads: int) -> None:
    for site in policy.sites():
        for name in site.linears if site.part in parts else ():
            parent, _, leaf = name.rpartition(".")
            linear = policy.module.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{name} is quantized: ONNX Runtime is compared on a policy in floating point")
            setattr(policy.module.get_submodule(parent), leaf, _OnnxLinear(linear, threads))


@contextmanager
def _marks(policy: AdaptedPolicy) -> Iterator[dict[str, list[float]]]:
    """While open, the times at which vision, language and each denoising step reach their first quantizable linear,
    and at which the last one of a step has answered (`end`)."""
    marks: dict[str, list[float]] = {"vision": [], "language": [], "action": [], "end": []}
    parts: dict[str, list[str]] = {}
    for site in policy.sites():
        parts.setdefault(site.part, []).extend(site.linears)
    handles = [
        policy.module.get_submodule(linears[0]).register_forward_pre_hook(_mark(marks[part]))
        for part, linears in parts.items()
    ]
    last = policy.module.get_submodule(parts["action"][-1])
    handles.append(last.register_forward_hook(_mark(marks["end"])))
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def _mark(times: list[float]) -> Callable[..., None]:
    def mark(module: nn.Module, *passed: object) -> None:
        times.append(perf_counter())

    return mark


def _times(policy: AdaptedPolicy, label: str, threads: int, taken: list[Stages]) -> PolicyTimes:
    stages = {
        name: summary([getattr(each, name) for each in taken])
        for name in ("before", "vision", "language", "action", "after")
    }
    stages["step"] = summary([step for each in taken for step in each.steps])
    whole = summary([each.whole for each in taken])
    return PolicyTimes(label, policy.execution, threads, whole, stages, policy.resident_bytes())
