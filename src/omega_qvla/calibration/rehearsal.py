"""What one calibration inference will do, found out without its products.

Everything of the model's own code runs, attention included, but the linears of its blocks answer at once. So a
mistake in observations or configuration shows in seconds, and what a run needs is known before it starts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla.calibration.batches import calibration_batches
from omega_qvla.calibration.lockstep import in_lockstep, meet
from omega_qvla.calibration.spill import Scale
from omega_qvla.policy import InputSite, Observation, StreamedPolicy


@dataclass(frozen=True)
class Rehearsal:
    """Of an inference with one observation."""

    tokens: dict[str, int]
    """That each site reads, over all cameras and denoising steps, by its name."""
    held: int
    """Bytes of activations that it holds while it waits at a meeting, at most."""


def rehearse(
    policy: StreamedPolicy, sites: Collection[InputSite], meetings: Collection[str], observations: Observation
) -> Rehearsal:
    """One inference on the first observation, in which the linears of blocks give zeros.

    Raises what the inference raises, `ValueError` if a camera is missing among others.
    """
    tokens: dict[str, int] = defaultdict(int)

    def listener(site: InputSite) -> Callable[..., None]:
        def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens[site.name] += inputs[0].flatten(0, -2).shape[0]
            if site.name in meetings:
                meet(site.name)

        return listen

    handles = [
        policy.module.get_submodule(site.linears[0]).register_forward_pre_hook(listener(site)) for site in sites
    ]
    batch, noise = next(calibration_batches(policy, observations, 0, 1))
    scale = Scale(policy.module)
    try:
        with torch.no_grad(), policy.rehearsing():
            for _ in in_lockstep([lambda: policy.infer(batch, noise)], scale):
                pass
    finally:
        for handle in handles:
            handle.remove()
    return Rehearsal(dict(tokens), scale.most)
