"""Visiting the input sites of a policy with calibration observations, in execution order.

Vision runs once per camera, language once per inference, the action part once per denoising step. So what a site of
the language model reads is complete as soon as all inferences have passed it; of the other parts, when all have
left the part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.calibration.batches import BATCH, calibration_batches
from omega_qvla.calibration.lockstep import in_lockstep, meet
from omega_qvla.calibration.spill import Keeper
from omega_qvla.calibration.statistics import CalibrationError, Needs, SiteStatistics
from omega_qvla.policy import InputSite, Observation, QuantizablePolicy


def collect(
    policy: QuantizablePolicy,
    needs: Mapping[InputSite, Needs],
    observations: Observation,
    *,
    noise_seed: int,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, SiteStatistics]:
    """What each site needs, all at once: `visit` without meetings. Statistics by the site's name."""
    visited = visit(policy, needs, observations, noise_seed=noise_seed, on_batch=on_batch)
    return {statistics.name: statistics for statistics in visited}


def visit(
    policy: QuantizablePolicy,
    needs: Mapping[InputSite, Needs],
    observations: Observation,
    *,
    noise_seed: int,
    batch_size: int = BATCH,
    meetings: Collection[str] = (),
    keeper: Keeper | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[SiteStatistics]:
    """Run the policy on all observations and give the statistics of each site as soon as they are complete.

    `needs`: sites in execution order. `meetings`: those, of the language model, where all batches wait for one
    another; while they wait, the statistics so far are given out, and the caller may put other modules in the
    place of linears, which the batches then go on with. Without meetings the batches run one after another.
    `on_batch`: called when a batch has reached its end or been abandoned because nothing more is needed.

    Raises `CalibrationError` if there are no observations, an input is not finite, or a site did not run as its
    part does; `ValueError` if a camera is missing.
    """
    if not len(observations):
        raise CalibrationError("there are no calibration observations")
    batches = list(calibration_batches(policy, observations, noise_seed, batch_size))
    open_sites = {site.name: (site, SiteStatistics(site.name, need)) for site, need in needs.items()}
    inferences = [partial(_infer, policy, batch, noise, on_batch) for batch, noise in batches]
    if not meetings:
        with _listening(policy, needs, open_sites, ()):
            for inference in inferences:
                inference()
    else:
        order = [site.name for site in needs]
        # Without gradients throughout: the batches enter and leave that state out of order.
        with torch.no_grad(), _listening(policy, needs, open_sites, meetings):
            for point in in_lockstep(inferences, keeper):
                for name in order[: order.index(point) + 1]:
                    if name in open_sites:
                        yield _completed(policy, *open_sites.pop(name))
                if not open_sites:
                    break
    for site, statistics in open_sites.values():
        yield _completed(policy, site, statistics)


def _infer(policy: QuantizablePolicy, batch: Observation, noise: Tensor, on_batch: Callable[[], None]) -> None:
    try:
        policy.infer(batch, noise)
    finally:
        on_batch()


def _completed(policy: QuantizablePolicy, site: InputSite, statistics: SiteStatistics) -> SiteStatistics:
    if not statistics.tokens:
        raise CalibrationError(f"{site.name} has no statistics: it never ran on the calibration observations")
    steps = set(range(policy.denoising_steps))
    if site.part == "action" and (unseen := steps - set(statistics.seen)):
        raise CalibrationError(f"{site.name} has no statistics for denoising step {min(unseen)}: it never ran there")
    return statistics


@contextmanager
def _listening(
    policy: QuantizablePolicy,
    sites: Collection[InputSite],
    open_sites: Mapping[str, tuple[InputSite, SiteStatistics]],
    meetings: Collection[str],
) -> Iterator[None]:
    """While open, the first linear of each site reports its input, and waits at the meetings."""

    def before(site: InputSite) -> Callable[..., None]:
        def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if site.name not in open_sites:
                raise CalibrationError(
                    f"{site.name} runs more than once per inference; only blocks of part 'vision' and 'action' may"
                )
            step = policy.step.current if site.part == "action" else None
            open_sites[site.name][1].add(inputs[0].detach().flatten(0, -2).float(), step)
            if site.name in meetings:
                meet(site.name)

        return listen

    def after(name: str) -> Callable[..., Any]:
        def answer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            """What has taken the linear's place while this call of it waited answers for it."""
            successor = policy.module.get_submodule(name)
            return output if successor is module else successor(inputs[0])

        return answer

    handles = []
    for site in sites:
        module = policy.module.get_submodule(site.linears[0])
        handles.append(module.register_forward_pre_hook(before(site)))
        if site.name in meetings:
            handles.append(module.register_forward_hook(after(site.linears[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
