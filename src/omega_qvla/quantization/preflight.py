"""What a quantization needs, said before it starts: memory, disk and time.

Sizes are counted on the plan; a rehearsal tells how many tokens every layer will read and what a waiting inference
holds; the machine's speed is measured in a fraction of a second. Time is an estimate, memory an upper bound that
the run is arranged to keep.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch

from omega_qvla.calibration.rehearsal import Rehearsal, rehearse
from omega_qvla.numerics.gptq import hessian_factor, round_with_factor, solver_dtype
from omega_qvla.numerics.quantizer import weight_scale
from omega_qvla.pack.manifest import Plan, PlannedSite
from omega_qvla.policy import Observation, StreamedPolicy
from omega_qvla.quantization.driver import Room, as_input, statistics_bytes

_WORKING_COPIES = 6
"""Of a linear's weight, in float64, that rounding holds at most: as it was, folded, as columns, their errors, and
what the search for scales compares."""
_KEPT_PER_TOKEN = 3
"""Copies of what the linears of a block give, in float32, that the model's own code holds while it runs."""


class ResourceError(RuntimeError):
    """A run that does not fit the machine or the budget; the message says what it needs."""


@dataclass(frozen=True)
class Memory:
    """Bytes of physical memory at the moment when most is needed."""

    process: int
    """What the process has taken already: libraries, and tensors that stay in floating point."""
    weights: int
    """Of the block that is visited."""
    solving: int
    """Hessian, its factor and the weights of the site where these take most."""
    statistics: int
    """Gathered at a time besides those of the site that is solved."""
    activations: int
    """Of the inference that runs, and of those that wait in memory."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Preflight:
    """What a run needs."""

    memory: Memory
    disk: int
    """Bytes at the destination: the checkpoint, finished blocks and activations that do not fit into memory."""
    forward_seconds: float
    """Estimate of the calibration inferences."""
    solving_seconds: float
    """Estimate of everything else."""
    room: Room
    """How the run is arranged so that it keeps to the memory."""


def preflight(
    policy: StreamedPolicy,
    plan: Plan,
    observations: Observation | None,
    *,
    budget: int | None,
    scratch: Path,
    kept_bytes: int,
) -> Preflight:
    """Arrange a run within `budget` bytes of physical memory (None: what it needs without spilling to disk).

    `scratch`: a directory on the disk that the checkpoint is written to. `kept_bytes`: of the tensors that stay in
    floating point.

    Raises `ResourceError` if budget or disk do not suffice, and whatever an inference raises at its rehearsal.
    """
    sites = list(plan.sites)
    waiting = [site for site in sites if plan.spec(site).needs_calibration]
    rehearsal = Rehearsal({}, 0)
    if waiting and observations is not None:
        firsts = {site.block: site.name for site in reversed(waiting) if site.part == "language"}
        rehearsal = rehearse(policy, [as_input(site) for site in waiting], set(firsts.values()), observations)
    count = len(observations) if waiting and observations is not None else 0

    blocks: dict[str, dict[str, int]] = {"language": {}, "others": {}}
    for site in waiting:
        sizes = blocks["language" if site.part == "language" else "others"]
        size = statistics_bytes(plan, site, policy.denoising_steps)
        sizes[site.block] = sizes.get(site.block, 0) + size
    language, others = max(blocks["language"].values(), default=0), blocks["others"]
    least = Memory(
        process=psutil.Process().memory_info().rss,
        weights=policy.streamed_capacity,
        solving=max((_solving_bytes(plan, site) for site in sites), default=0),
        statistics=max(language, max(others.values(), default=0)),
        activations=_running_bytes(plan, rehearsal) + rehearsal.held,
    )
    waiting_activations = rehearsal.held * max(0, count - 1)
    most = replace(
        least,
        statistics=max(language, sum(others.values())),
        activations=least.activations + waiting_activations,
    )
    if budget is not None and least.total > budget:
        raise ResourceError(
            f"the run needs {least.total / 2**30:.1f} GiB of memory at least, the budget is "
            f"{budget / 2**30:.1f} GiB; raise --memory-budget"
        )
    memory = most if budget is None else _arranged(least, most, budget)
    resting = memory.activations - least.activations + rehearsal.held
    room = Room(
        statistics=memory.statistics,
        batch_size=1,
        lockstep=True,
        activations=None if memory.activations == most.activations else resting,
        scratch=scratch,
    )
    spilled = rehearsal.held * count - resting if room.activations is not None else 0
    packed = sum(_packed_bytes(plan, site) for site in sites)
    disk = kept_bytes + 2 * packed + spilled
    free = shutil.disk_usage(scratch).free
    if disk > free:
        raise ResourceError(
            f"the run needs {disk / 2**30:.1f} GiB of disk, {scratch} has {free / 2**30:.1f} GiB left; free some, or "
            "choose another place for --out"
        )
    passes = 1 if memory.statistics >= sum(others.values()) else -(-sum(others.values()) // memory.statistics)
    forward, squares = _work(plan, rehearsal, count)
    speed = _products_per_second()
    solving = squares / speed + sum(_solving_seconds(plan, Pace.measured()))
    return Preflight(memory, disk, passes * forward / speed, solving, room)


def _arranged(least: Memory, most: Memory, budget: int) -> Memory:
    """What is left of the budget, given first to statistics, which save passes, then to waiting inferences."""
    left = budget - least.total
    statistics = min(most.statistics, least.statistics + left)
    left -= statistics - least.statistics
    return replace(least, statistics=statistics, activations=min(most.activations, least.activations + left))


def _solving_bytes(plan: Plan, site: PlannedSite) -> int:
    spec, width = plan.spec(site), site.in_features
    element = torch.empty(0, dtype=solver_dtype(width)).element_size()
    rows = [linear.out_features for linear in plan.linears if linear.name in site.linears]
    double, single = 8, 4
    fitting = (3 * double + single) * width * sum(rows)
    hessian = 2 * element * width * width if spec.needs_hessian else 0
    rounding = hessian // 2 + (_WORKING_COPIES * double * max(rows) + single * sum(rows)) * width
    return max(fitting, hessian, rounding)


def _running_bytes(plan: Plan, rehearsal: Rehearsal) -> int:
    """Of the activations of one inference inside the block where they take most."""
    outputs = {linear.name: linear.out_features for linear in plan.linears}
    blocks: dict[str, int] = {}
    for site in plan.sites:
        tokens = rehearsal.tokens.get(site.name, 0)
        given = tokens * (site.in_features + sum(outputs[name] for name in site.linears))
        blocks[site.block] = blocks.get(site.block, 0) + 4 * given
    return _KEPT_PER_TOKEN * max(blocks.values(), default=0)


def _packed_bytes(plan: Plan, site: PlannedSite) -> int:
    spec = plan.spec(site)
    bits = 16 if spec.weight.mixed else spec.weight.bits
    per_scale = spec.weight.group_size or site.in_features
    return _elements(plan, site) * bits // 8 + 2 * _elements(plan, site) // per_scale


def _elements(plan: Plan, site: PlannedSite) -> int:
    return sum(linear.out_features for linear in plan.linears if linear.name in site.linears) * site.in_features


def _work(plan: Plan, rehearsal: Rehearsal, observations: int) -> tuple[float, float]:
    """Multiplications and additions of all inferences, and of the Hessians."""
    forward = squares = 0.0
    for site in plan.sites:
        tokens = observations * rehearsal.tokens.get(site.name, 0)
        forward += 2.0 * tokens * _elements(plan, site)
        squares += 1.0 * tokens * site.in_features**2 * plan.spec(site).needs_hessian
    return forward, squares


@dataclass(frozen=True)
class Pace:
    """Of this machine now, in seconds."""

    factor: dict[torch.dtype, float]
    """Of a Hessian's factor, by its width cubed."""
    rounding: dict[torch.dtype, float]
    """Of rounding a weight with it, but for passing its error on, whose products grow with the width."""
    products: float
    """Of a multiplication and an addition in a product of matrices."""
    search: float
    """Of a weight's scale."""

    @classmethod
    def measured(cls) -> Pace:
        """On square layers of middling size: some seconds."""
        products = 2 / _products_per_second()
        factor, rounding = {}, {}
        for width in (1024, 2048):
            dtype = solver_dtype(width)
            hessian = torch.eye(width, dtype=dtype)
            weight = torch.randn(width, width, dtype=dtype, generator=torch.Generator().manual_seed(0))
            factor[dtype] = _seconds(partial(hessian_factor, hessian, 0.01)) / width**3
            whole = _seconds(partial(round_with_factor, weight, hessian, bits=4)) / width**2
            rounding[dtype] = max(0.0, whole - _passed_on(width) * products)
        return cls(
            factor,
            rounding,
            products,
            _seconds(partial(weight_scale, weight.double(), 4, 64, "mse")) / weight.numel(),
        )


def _solving_seconds(plan: Plan, pace: Pace) -> Iterator[float]:
    for site in plan.sites:
        spec, width, elements = plan.spec(site), site.in_features, _elements(plan, site)
        if spec.weight.scale_search != "max":
            yield elements * pace.search
        if spec.weight.rounding != "rtn":
            dtype = solver_dtype(width)
            of_weight = pace.rounding[dtype] + _passed_on(width) * pace.products
            yield width**3 * pace.factor[dtype] + elements * of_weight


def _passed_on(width: int) -> float:
    """How many columns, in the mean, a column's error goes to."""
    return width / 2


def _products_per_second() -> float:
    """Multiplications and additions of float32 that this machine does in a matrix product now."""
    x = torch.ones(1024, 1024)
    return 2 * 1024**3 / _seconds(lambda: x @ x)


def _seconds(work: Callable[[], object]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
