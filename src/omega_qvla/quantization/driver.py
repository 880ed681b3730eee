"""Quantizing a policy block by block, in execution order.

Statistics are gathered for as many blocks at a time as there is room for, used, and dropped; where the batches of
observations go in lockstep, for one block of the language model after the other in a single pass. Nothing of the
policy is modified. A finished block can be kept, so that a run that was interrupted, or stopped at a layer that
failed, goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from omega_qvla.calibration.batches import BATCH
from omega_qvla.calibration.replay import record_block
from omega_qvla.calibration.spill import Spill
from omega_qvla.calibration.statistics import MAX_SAMPLES, CalibrationError, Needs, SiteStatistics
from omega_qvla.calibration.visit import visit
from omega_qvla.pack.manifest import Plan, PlannedSite
from omega_qvla.pack.site import PackedSite, site_from, tensors_of
from omega_qvla.pack.unfinished import Unfinished
from omega_qvla.policy import InputSite, Observation, QuantizablePolicy
from omega_qvla.quantization.corrections import apply_corrections, correctable, fit_corrections
from omega_qvla.quantization.plan import build_plan
from omega_qvla.quantization.reconstruction import Learned, reconstruct
from omega_qvla.quantization.sensitivity import (
    ChannelNoise,
    allocate_bits,
    channel_noise,
    measure_sensitivity,
    round_rows,
)
from omega_qvla.quantization.site import Found, quantize_site
from omega_qvla.runtime import installed
from omega_qvla.spec import AllocationSpec, LinearSpec, Recipe, RecipeError

_SPEC: TypeAdapter[LinearSpec] = TypeAdapter(LinearSpec)

PARTS = ("vision", "language", "action")
"""In the order in which a policy runs them."""

OnProgress = Callable[[str, float], None]
"""Called with what is being done and the share of the whole that is finished, 0..1."""


@dataclass(frozen=True)
class Room:
    """How much memory a run takes, and how it makes do with it. None of it changes a result but `batch_size`, on
    which rounding errors depend."""

    statistics: int = 4 * 2**30
    """Bytes of statistics held at a time; what does not fit is gathered in further passes over the observations."""
    batch_size: int = BATCH
    """Observations in one inference."""
    lockstep: bool = False
    """Meet at every block of the language model, so that its statistics and weights are in memory block by block."""
    activations: int | None = None
    """Bytes of inferences that wait for the others; what does not fit lies in `scratch` meanwhile. None: no limit."""
    scratch: Path | None = None
    """An existing directory."""


@dataclass(frozen=True)
class Quantized:
    """A policy's quantized sites and the plan that they fulfil."""

    plan: Plan
    sites: list[PackedSite]
    """In execution order; backed by files if finished blocks are kept."""
    changed: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of layers kept in floating point into which a correction was folded, by their checkpoint names."""


def quantize_policy(
    policy: QuantizablePolicy,
    recipe: Recipe,
    observations: Observation | None,
    *,
    noise_seed: int = 0,
    room: Room | None = None,
    unfinished: Unfinished | None = None,
    on_progress: OnProgress = lambda what, share: None,
) -> Quantized:
    """Quantize every linear that the recipe says.

    `observations`: calibration observations; may be None for recipes without calibration. `unfinished`: where
    finished blocks are kept, and taken from if they are there.

    Raises `RecipeError` if the recipe does not fit the policy, `CalibrationError` if a statistic is missing or
    not finite, a weight is not finite, or a solver fails on a layer.
    """
    return _Run(policy, recipe, observations, noise_seed, room or Room(), unfinished, on_progress).quantized()


def needs_whole_policy(plan: Plan) -> bool:
    """Whether a method looks at more than one block at a time, or runs blocks alone: the weights must be resident."""
    specs = [plan.spec(site) for site in plan.sites]
    return plan.recipe.corrections is not None or any(s.learned or s.weight.allocation is not None for s in specs)


@dataclass(frozen=True)
class _Pass:
    """One pass over the observations."""

    sites: list[PlannedSite]
    """Whose statistics are gathered, in execution order."""
    meetings: list[PlannedSite] = field(default_factory=list)
    """Where the batches meet. If the first comes after all sites, the inferences end there."""


class _Run:
    """One quantization of one policy."""

    def __init__(
        self,
        policy: QuantizablePolicy,
        recipe: Recipe,
        observations: Observation | None,
        noise_seed: int,
        room: Room,
        unfinished: Unfinished | None,
        on_progress: OnProgress,
    ) -> None:
        self.policy, self.recipe, self.noise_seed = policy, recipe, noise_seed
        self.room, self.unfinished, self.on_progress = room, unfinished, on_progress
        self.plan = build_plan(recipe, policy)
        if observations is None and self.plan.needs_calibration:
            raise CalibrationError(f"recipe {recipe.name!r} needs calibration observations")
        if recipe.corrections is not None:
            correctable(policy, recipe.corrections)
        self._observations = observations
        self._blocks: dict[str, list[PlannedSite]] = {}
        for site in self.plan.sites:
            self._blocks.setdefault(site.block, []).append(site)
        self.widths: dict[str, Tensor] = {}
        self._learned: dict[str, Learned] = {}
        self._finished: dict[str, list[PackedSite]] = {}
        self._begun: dict[str, dict[str, PackedSite]] = {}

    @property
    def observations(self) -> Observation:
        assert self._observations is not None
        return self._observations

    def quantized(self) -> Quantized:
        self.widths = self._allocated()
        for block in self._blocks:
            if (kept := self._kept(block)) is not None:
                self._finished[block] = kept
        with ExitStack() as until_the_end:
            self._quantize(until_the_end)
        sites = [site for block in self._blocks for site in self._finished[block]]
        changed: dict[str, Tensor] = {}
        if self.recipe.corrections is not None:
            self.on_progress("matching the attention of full precision", 0.99)
            found = fit_corrections(
                self.policy, sites, self.recipe.corrections, self.observations, noise_seed=self.noise_seed
            )
            sites, changed = apply_corrections(found, sites, self.policy)
        self.on_progress("done", 1.0)
        return Quantized(self.plan, sites, changed)

    def _quantize(self, until_the_end: ExitStack) -> None:
        """Quantize what is not finished. With calibration on quantized inputs, language sites take part in the
        policy as soon as they are quantized, until the end."""
        propagated = self.recipe.calibration_inputs == "quantized"

        def take_part(sites: list[PackedSite]) -> None:
            if propagated and sites[0].part == "language":
                until_the_end.enter_context(installed(self.policy.module, sites, self.policy.step))

        for finished in self._finished.values():
            take_part(finished)
        for block, sites in self._blocks.items():
            if block not in self._finished and not any(self._waits(site) for site in sites):
                self._finish(block)
        for tour in self._passes():
            for site, statistics in self._visited(tour):
                take_part([self._quantize_site(site, statistics)])

    def _quantize_site(self, site: PlannedSite, statistics: SiteStatistics | None) -> PackedSite:
        """One site, and its block if nothing else of it waits for statistics."""
        self._report(site.block)
        begun = self._begun.setdefault(site.block, {})
        found = Found(statistics, self.widths)
        if (learned := self._learn(site.block)) is not None:
            found = replace(found, smoothing=learned.smoothing.get(site.name), clipping=learned.clipping)
        weights = {name: self.policy.weight(name) for name in site.linears}
        biases = {name: bias for name in site.linears if (bias := self._bias(name)) is not None}
        packed = quantize_site(site, self.plan.spec(site), weights, biases, found, self.policy.denoising_steps)
        begun[site.name] = packed
        if statistics is not None and not any(
            self._waits(other) and other.name not in begun for other in self._blocks[site.block]
        ):
            self._finish(site.block)
        return packed

    def _finish(self, block: str) -> None:
        for site in self._blocks[block]:
            if not self._waits(site):
                self._quantize_site(site, None)
        begun = self._begun.pop(block)
        sites = [begun[site.name] for site in self._blocks[block]]
        if self.unfinished is not None:
            self.unfinished.put(block, self._made_from(block), tensors_of(sites))
            sites = self._kept(block) or sites
        self._finished[block] = sites
        self._learned.pop(block, None)

    def _learn(self, block: str) -> Learned | None:
        sites = self._blocks[block]
        specs = {site.name: self.plan.spec(site) for site in sites}
        if block not in self._learned and any(spec.learned for spec in specs.values()):
            calls = record_block(self.policy, block, self.observations, noise_seed=self.noise_seed)
            self._learned[block] = reconstruct(self.policy, sites, specs, calls, seed=self.noise_seed)
        return self._learned.get(block)

    def _allocated(self) -> dict[str, Tensor]:
        """The bits of every output channel of the linears that compete for a budget, uint8 [out] by linear."""
        sites = [site for site in self.plan.sites if self.plan.spec(site).weight.allocation is not None]
        if not sites:
            return {}
        specs = {self.plan.spec(site).weight.allocation for site in sites}
        if len(specs) != 1:
            raise RecipeError(
                f"the rules of recipe {self.recipe.name!r} have different allocation tables; give them the same"
            )
        spec = next(iter(specs))
        assert spec is not None
        made_from = [[site.name, self._spec(site)] for site in sites]
        if self.unfinished is not None and (kept := self.unfinished.get("allocation", made_from)) is not None:
            return kept
        widths = self._measured_widths(sites, spec)
        if self.unfinished is not None:
            self.unfinished.put("allocation", made_from, widths)
        return widths

    def _measured_widths(self, sites: list[PlannedSite], spec: AllocationSpec) -> dict[str, Tensor]:
        statistics = {site.name: found for site, found in self._visited(_Pass(sites))}
        noises: dict[str, ChannelNoise] = {}
        for site in sites:
            found, group_size = statistics[site.name], self.plan.spec(site).weight.group_size
            assert found.hessian is not None
            for name in site.linears:
                rounding = partial(round_rows, group_size=group_size)
                noises[name] = channel_noise(self.policy.weight(name), found.hessian, found.tokens, rounding)
        sensitivity = measure_sensitivity(
            self.policy, noises, self.observations, spec, noise_seed=self.noise_seed, on_progress=self.on_progress
        )
        in_features = {name: site.in_features for site in sites for name in site.linears}
        return allocate_bits(sensitivity, in_features, spec.average_bits)

    def _passes(self) -> list[_Pass]:
        """What to visit in each pass over the observations, in execution order."""
        waiting = [
            site
            for block, sites in self._blocks.items()
            for site in sites
            if block not in self._finished and self._waits(site)
        ]
        propagated = self.recipe.calibration_inputs == "quantized"
        if not (propagated or self.room.lockstep):
            return [_Pass(group) for group in self._groups(waiting)]
        vision, language, action = ([site for site in waiting if site.part == part] for part in PARTS)
        turn = next((site for site in self.plan.sites if site.part == "language"), None)
        firsts = {site.block: site for site in reversed(language)}
        meetings = [site for site in language if propagated or firsts[site.block] is site]
        with_language, *after = self._groups(action) or [[]]
        passes = [
            *(_Pass(group, [turn] if turn else []) for group in self._groups(vision)),
            _Pass(language + with_language, meetings),
            *map(_Pass, after),
        ]
        return [each for each in passes if each.sites]

    def _groups(self, sites: list[PlannedSite]) -> list[list[PlannedSite]]:
        """Sites in execution order, cut between blocks so that the statistics of a group stay within the room."""
        groups: list[list[PlannedSite]] = []
        used = 0
        for _, members in groupby(sites, key=lambda site: site.block):
            block = list(members)
            size = sum(statistics_bytes(self.plan, site, self.policy.denoising_steps) for site in block)
            if not groups or used + size > self.room.statistics:
                groups.append([])
                used = 0
            groups[-1] += block
            used += size
        return groups

    def _visited(self, tour: _Pass) -> Iterator[tuple[PlannedSite, SiteStatistics]]:
        """The sites of a pass with their statistics, as soon as these are complete."""
        room, keeper = self.room, None
        if room.activations is not None and tour.meetings:
            assert room.scratch is not None
            keeper = Spill(room.scratch, room.activations, self.policy.module)
        sites = {site.name: site for site in tour.sites}
        visited = visit(
            self.policy,
            {as_input(site): self._needs(site) for site in tour.sites}
            | {as_input(site): Needs() for site in tour.meetings if site.name not in sites},
            self.observations,
            noise_seed=self.noise_seed,
            batch_size=room.batch_size,
            meetings=[site.name for site in tour.meetings],
            keeper=keeper,
        )
        for statistics in visited:
            if statistics.name in sites:
                yield sites[statistics.name], statistics

    def _needs(self, site: PlannedSite) -> Needs:
        spec = self.plan.spec(site)
        return Needs(spec.needs_hessian, spec.needs_samples)

    def _waits(self, site: PlannedSite) -> bool:
        """Whether a site needs statistics."""
        return self.plan.spec(site).needs_calibration

    def _kept(self, block: str) -> list[PackedSite] | None:
        """A block that an interrupted run has finished."""
        if self.unfinished is None:
            return None
        tensors = self.unfinished.get(block, self._made_from(block))
        if tensors is None:
            return None
        return [
            site_from(tensors, site.name, site.part, site.in_features, self.plan.spec(site), site.linears)
            for site in self._blocks[block]
        ]

    def _made_from(self, block: str) -> list[Any]:
        widths = {name: self.widths[name].tolist() for s in self._blocks[block] for name in s.linears if self.widths}
        how = [self.noise_seed, self.room.batch_size, self.recipe.calibration_inputs, widths]
        return [*how, [[site.name, site.linears, self._spec(site)] for site in self._blocks[block]]]

    def _bias(self, linear: str) -> Tensor | None:
        bias = self.policy.module.get_submodule(linear).bias
        assert bias is None or isinstance(bias, Tensor)
        return None if bias is None else bias.detach()

    def _spec(self, site: PlannedSite) -> Any:
        return _SPEC.dump_python(self.plan.spec(site), mode="json")

    def _report(self, block: str) -> None:
        done = sum(len(sites) for sites in self._finished.values()) + sum(map(len, self._begun.values()))
        self.on_progress(block, done / len(self.plan.sites))


def statistics_bytes(plan: Plan, site: PlannedSite, denoising_steps: int) -> int:
    """Memory that the statistics of a site take."""
    spec = plan.spec(site)
    steps = denoising_steps if site.part == "action" else 1
    rows = site.in_features * spec.needs_hessian + MAX_SAMPLES * steps * spec.needs_samples
    return 4 * site.in_features * rows


def as_input(site: PlannedSite) -> InputSite:
    """A planned site as calibration visits it."""
    return InputSite(site.name, site.part, site.block, site.linears)
