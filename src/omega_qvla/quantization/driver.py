"""Quantizing a policy block by block, in execution order.

Statistics are gathered from the floating-point policy for as many blocks at a time as the memory budget
holds, used, and dropped. Nothing of the policy is modified. A finished block can be kept, so that a run that
was interrupted, or stopped at a layer that failed, goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from omega_qvla.calibration.replay import record_block
from omega_qvla.calibration.statistics import MAX_SAMPLES, CalibrationError, Needs, SiteStatistics, collect
from omega_qvla.pack.manifest import Plan, PlannedSite
from omega_qvla.pack.site import PackedSite, site_from, tensors_of
from omega_qvla.pack.unfinished import Unfinished
from omega_qvla.policy import InputSite, Observation, QuantizablePolicy
from omega_qvla.quantization.corrections import apply_corrections, fit_corrections
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
from omega_qvla.spec import AllocationSpec, LinearSpec, Recipe, RecipeError

MEMORY_BUDGET = 4 * 2**30
"""Bytes of statistics held at a time."""

_SPEC: TypeAdapter[LinearSpec] = TypeAdapter(LinearSpec)

OnProgress = Callable[[str, float], None]
"""Called with what is being done and the share of the whole that is finished, 0..1."""


@dataclass(frozen=True)
class Quantized:
    """A policy's quantized sites and the plan that they fulfil."""

    plan: Plan
    sites: list[PackedSite]
    changed: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of layers kept in floating point into which a correction was folded, by their checkpoint names."""


def quantize_policy(
    policy: QuantizablePolicy,
    recipe: Recipe,
    observations: Observation | None,
    *,
    noise_seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
    unfinished: Unfinished | None = None,
    on_progress: OnProgress = lambda what, share: None,
) -> Quantized:
    """Quantize every linear that the recipe says.

    `observations`: calibration observations; may be None for recipes without calibration. `unfinished`: where
    finished blocks are kept, and taken from if they are there.

    Raises `RecipeError` if the recipe does not fit the policy, `CalibrationError` if a statistic is missing or
    not finite, a weight is not finite, or a solver fails on a layer.
    """
    return _Run(policy, recipe, observations, noise_seed, memory_budget, unfinished, on_progress).quantized()


class _Run:
    """One quantization of one policy."""

    def __init__(
        self,
        policy: QuantizablePolicy,
        recipe: Recipe,
        observations: Observation | None,
        noise_seed: int,
        memory_budget: int,
        unfinished: Unfinished | None,
        on_progress: OnProgress,
    ) -> None:
        self.policy, self.recipe, self.noise_seed = policy, recipe, noise_seed
        self.memory_budget, self.unfinished, self.on_progress = memory_budget, unfinished, on_progress
        self.plan = build_plan(recipe, policy)
        if observations is None and self.plan.needs_calibration:
            raise CalibrationError(f"recipe {recipe.name!r} needs calibration observations")
        self._observations = observations
        self.packed: list[PackedSite] = []
        self.widths: dict[str, Tensor] = {}

    @property
    def observations(self) -> Observation:
        assert self._observations is not None
        return self._observations

    def quantized(self) -> Quantized:
        blocks = list(dict.fromkeys(site.block for site in self.plan.sites))
        self.widths = self._allocated()
        kept = {block: self._kept(block) for block in blocks}
        for batch in self._passes([block for block in blocks if kept[block] is None]):
            statistics = self._statistics([site for block in batch for site in self._sites(block)])
            for block in batch:
                self._report(block)
                kept[block] = self._quantize_block(block, statistics)
        sites = [site for block in blocks for site in kept[block] or []]
        changed: dict[str, Tensor] = {}
        if self.recipe.corrections is not None:
            self.on_progress("matching the attention of full precision", 0.99)
            found = fit_corrections(
                self.policy, sites, self.recipe.corrections, self.observations, noise_seed=self.noise_seed
            )
            sites, changed = apply_corrections(found, sites, self.policy)
        self.on_progress("done", 1.0)
        return Quantized(self.plan, sites, changed)

    def _quantize_block(self, block: str, statistics: dict[str, SiteStatistics]) -> list[PackedSite]:
        sites = self._sites(block)
        learned = self._learned(block)
        packed = []
        for site in sites:
            modules = {name: self.policy.module.get_submodule(name) for name in site.linears}
            found = Found(statistics.pop(site.name, None), self.widths)
            if learned is not None:
                found = replace(found, smoothing=learned.smoothing.get(site.name), clipping=learned.clipping)
            packed.append(quantize_site(site, self.plan.spec(site), modules, found, self.policy.denoising_steps))
        if self.unfinished is not None:
            self.unfinished.put(block, self._made_from(block), tensors_of(packed))
        self.packed += packed
        return packed

    def _learned(self, block: str) -> Learned | None:
        sites = self._sites(block)
        specs = {site.name: self.plan.spec(site) for site in sites}
        if not any(spec.learned for spec in specs.values()):
            return None
        calls = record_block(self.policy, block, self.observations, noise_seed=self.noise_seed)
        return reconstruct(self.policy, sites, specs, calls, seed=self.noise_seed)

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
        statistics = self._statistics(sites)
        noises: dict[str, ChannelNoise] = {}
        for site in sites:
            found, group_size = statistics[site.name], self.plan.spec(site).weight.group_size
            assert found.hessian is not None
            for name in site.linears:
                weight = self.policy.module.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                rounding = partial(round_rows, group_size=group_size)
                noises[name] = channel_noise(weight, found.hessian, found.tokens, rounding)
        sensitivity = measure_sensitivity(
            self.policy, noises, self.observations, spec, noise_seed=self.noise_seed, on_progress=self.on_progress
        )
        in_features = {name: site.in_features for site in sites for name in site.linears}
        return allocate_bits(sensitivity, in_features, spec.average_bits)

    def _statistics(self, sites: list[PlannedSite]) -> dict[str, SiteStatistics]:
        needs = {
            InputSite(site.name, site.part, site.block, site.linears): Needs(spec.needs_hessian, spec.needs_samples)
            for site in sites
            if (spec := self.plan.spec(site)).needs_calibration
        }
        if not needs:
            return {}
        return collect(self.policy, needs, self.observations, noise_seed=self.noise_seed)

    def _kept(self, block: str) -> list[PackedSite] | None:
        """A block that an interrupted run has finished."""
        if self.unfinished is None:
            return None
        tensors = self.unfinished.get(block, self._made_from(block))
        if tensors is None:
            return None
        return [
            site_from(tensors, site.name, site.part, site.in_features, self.plan.spec(site), site.linears)
            for site in self._sites(block)
        ]

    def _made_from(self, block: str) -> list[Any]:
        widths = {name: self.widths[name].tolist() for s in self._sites(block) for name in s.linears if self.widths}
        return [self.noise_seed, widths, [[site.name, site.linears, self._spec(site)] for site in self._sites(block)]]

    def _spec(self, site: PlannedSite) -> Any:
        return _SPEC.dump_python(self.plan.spec(site), mode="json")

    def _sites(self, block: str) -> list[PlannedSite]:
        return [site for site in self.plan.sites if site.block == block]

    def _passes(self, blocks: list[str]) -> list[list[str]]:
        """Blocks in execution order, cut so that the statistics of a pass stay within the budget."""
        passes: list[list[str]] = []
        used = 0
        for block in blocks:
            size = sum(self._statistics_bytes(site) for site in self._sites(block))
            if not passes or used + size > self.memory_budget:
                passes.append([])
                used = 0
            passes[-1].append(block)
            used += size
        return passes

    def _statistics_bytes(self, site: PlannedSite) -> int:
        spec = self.plan.spec(site)
        steps = self.policy.denoising_steps if site.part == "action" else 1
        rows = site.in_features * spec.needs_hessian + MAX_SAMPLES * steps * spec.needs_samples
        return 4 * site.in_features * rows

    def _report(self, block: str) -> None:
        self.on_progress(block, len(self.packed) / len(self.plan.sites))
