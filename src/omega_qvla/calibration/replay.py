"""One block of a policy, called again as it was during calibration.

Methods that optimize a block's output run the block alone, many times over. A call is kept with everything that
it read, so that the unchanged block gives the recorded output again, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from omega_qvla.calibration.batches import BATCH, calibration_batches
from omega_qvla.calibration.statistics import CalibrationError
from omega_qvla.policy import Observation, QuantizablePolicy

MAX_CALLS = 32
"""Calls kept of a block, for all denoising steps together."""


@dataclass(frozen=True)
class BlockCall:
    """One call of a block with a batch of observations, in floating point."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """As they were before the call, which may write to some of them (a cache of keys and values)."""
    output: Tensor
    """What the block returned; the first element if that was a tuple."""
    step: int | None
    """The denoising step; None for blocks that run once per inference."""

    def run(self, block: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output if its parameters `weights`, by their names in the block, are replaced.

        Gradients flow from the output to the weights. Neither the block nor the recorded arguments are modified.
        """
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        return _first(functional_call(block, dict(weights or {}), args, kwargs))


def record_block(
    policy: QuantizablePolicy,
    block: str,
    observations: Observation,
    *,
    noise_seed: int,
    max_calls: int = MAX_CALLS,
) -> list[BlockCall]:
    """At most `max_calls` calls of the module `block` while the policy infers on batches of 8 observations.

    An action block is recorded equally often in every denoising step, at least once, and on batches that differ
    from step to step. The noise of observation i depends on `noise_seed` and i alone. Of a cache of keys and
    values, only the layer that the block uses is kept.

    Raises `CalibrationError` if the block never ran, or does not give its output again when it is called alone;
    `AttributeError` if the policy has no such module.
    """
    module = policy.module.get_submodule(block)
    batches = -(-len(observations) // BATCH)
    in_steps = any(site.block == block and site.part == "action" for site in policy.sites())
    steps: list[int | None] = [*range(policy.denoising_steps)] if in_steps else [None]
    chosen = _chosen(batches, steps, max(1, max_calls // len(steps)))
    calls: list[BlockCall] = []
    for number, (batch, noise) in enumerate(calibration_batches(policy, observations, noise_seed)):
        if wanted := {step for step in steps if number in chosen[step]}:
            with _recording(policy, module, wanted, calls):
                policy.infer(batch, noise)
    if missing := set(steps) - {call.step for call in calls}:
        where = "" if missing == {None} else f" in denoising step {min(step for step in missing if step is not None)}"
        raise CalibrationError(
            f"{block} cannot be reconstructed: it never ran{where} on the calibration observations"
        )
    with torch.no_grad():
        if not all(torch.equal(call.run(module), call.output) for call in calls):
            raise CalibrationError(
                f"{block} cannot be reconstructed: called alone with the same arguments, it gives another output"
            )
    return calls


def _chosen(batches: int, steps: list[int | None], count: int) -> dict[int | None, set[int]]:
    """The batches that are recorded in each step: `count` evenly spaced ones, shifted by one from step to step."""
    count = min(count, batches)
    spaced = [i * batches // count for i in range(count)] if count else []
    return {step: {(batch + (step or 0)) % batches for batch in spaced} for step in steps}


@contextmanager
def _recording(
    policy: QuantizablePolicy, module: nn.Module, steps: set[int | None], calls: list[BlockCall]
) -> Iterator[None]:
    """While open, calls of the module in one of the steps are appended to `calls`."""
    pending: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def current() -> int | None:
        return policy.step.current if policy.step.running else None

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if current() in steps:
            pending.append(copy.deepcopy((args, kwargs), _foreign_layers(module, (*args, *kwargs.values()))))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if current() in steps:
            calls.append(BlockCall(*pending.pop(), _first(output).detach().clone(), current()))

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _foreign_layers(block: nn.Module, arguments: tuple[Any, ...]) -> dict[int, Any]:
    """What `deepcopy` is told to put in place of the cache layers that are not the block's.

    In transformers, an attention reads and writes the one layer of the cache whose number is its `layer_idx`.
    Without this, every call would hold the keys and values of the whole stack.
    """
    own = {module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")}
    if not own:
        return {}
    caches = [argument for argument in arguments if isinstance(getattr(argument, "layers", None), list)]
    return {id(layer): () for cache in caches for i, layer in enumerate(cache.layers) if i not in own}


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
