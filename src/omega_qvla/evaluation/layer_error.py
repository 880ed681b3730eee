"""How far each quantized linear is from the one that it replaces, on what that one reads in full precision.

No layer's error reaches another: this says where error arises, not how it adds up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.evaluation.recording import RecordedObservation
from omega_qvla.policy import InputSite, Observation, Policy, QuantizablePolicy
from omega_qvla.spec import Part

LAYER_OBSERVATIONS = 16
_BATCH = 8


@dataclass(frozen=True)
class LayerError:
    """One quantized linear."""

    name: str
    part: Part
    block: int
    """Number of its layer within the part, from 0."""
    normalized_mse: float
    """Sum of (ŷ − y)² over sum of y², over tokens, channels and denoising steps; 0 is equality."""


def has_layers(policy: Policy) -> bool:
    """Whether the policy shows its layers, in floating point or quantized."""
    return isinstance(getattr(policy, "module", None), nn.Module) and hasattr(policy, "sites")


def layer_errors(
    reference: QuantizablePolicy, policy: QuantizablePolicy, recorded: Sequence[RecordedObservation]
) -> tuple[LayerError, ...]:
    """Every linear that the policy has in another form than the reference, in execution order.

    The reference infers the recorded observations under their own noise; each quantized linear is given what the
    reference's linear reads there, in the same denoising step. Linears that the observations do not reach, or whose
    output is always zero, are left out.
    """
    sites = [site for site in reference.sites() if _replaced(reference, policy, site)]
    squared: dict[str, float] = defaultdict(float)
    power: dict[str, float] = defaultdict(float)

    def compare(name: str, quantized: nn.Module) -> Callable[..., None]:
        def listen(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
            running = reference.step.running
            with policy.step.at(reference.step.current) if running else nullcontext():
                error = quantized(inputs[0]).double() - y.double()
            squared[name] += error.square().sum().item()
            power[name] += y.double().square().sum().item()

        return listen

    with ExitStack() as hooks, torch.no_grad():
        for name in (name for site in sites for name in site.linears):
            listen = compare(name, policy.module.get_submodule(name))
            hooks.callback(reference.module.get_submodule(name).register_forward_hook(listen).remove)
        for start in range(0, len(recorded), _BATCH):
            part = recorded[start : start + _BATCH]
            noise = torch.cat([item.noise(reference.noise_shape) for item in part])
            reference.infer(Observation.concatenate([item.observation for item in part]), noise)
    blocks = _numbered(reference.sites())
    return tuple(
        LayerError(name, site.part, blocks[site.part, site.block], squared[name] / power[name])
        for site in sites
        for name in site.linears
        if power.get(name)
    )


def _replaced(reference: QuantizablePolicy, policy: QuantizablePolicy, site: InputSite) -> bool:
    """Whether the linears of a site are of another kind in the policy."""
    first = site.linears[0]
    return type(policy.module.get_submodule(first)) is not type(reference.module.get_submodule(first))


def _numbered(sites: Sequence[InputSite]) -> dict[tuple[Part, str], int]:
    """The number of each layer within its part."""
    numbers: dict[tuple[Part, str], int] = {}
    for site in sites:
        numbers.setdefault((site.part, site.block), sum(part == site.part for part, _ in numbers))
    return numbers
