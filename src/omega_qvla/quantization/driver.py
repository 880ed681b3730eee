"""Quantizing a policy block by block, in execution order.

Statistics are gathered from the floating-point policy for as many blocks at a time as the memory budget
holds, used, and dropped. Nothing of the policy is modified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla.calibration.statistics import MAX_SAMPLES, CalibrationError, Needs, SiteStatistics, collect
from omega_qvla.numerics.gptq import gptq
from omega_qvla.numerics.quantizer import SCALE_DTYPE, percentile, qmax, quantize, weight_scale
from omega_qvla.numerics.smoothing import smoothing_factor
from omega_qvla.numerics.transform import Transform, fit_transform
from omega_qvla.pack.bits import pack
from omega_qvla.pack.manifest import Plan, PlannedSite
from omega_qvla.pack.site import PackedLinear, PackedSite
from omega_qvla.policy import InputSite, Observation, QuantizablePolicy
from omega_qvla.quantization.plan import build_plan
from omega_qvla.spec import ActivationSpec, LinearSpec, Recipe

MEMORY_BUDGET = 4 * 2**30
"""Bytes of statistics held at a time."""

OnProgress = Callable[[str, float], None]
"""Called with what is being done and the share of the whole that is finished, 0..1."""


@dataclass(frozen=True)
class Quantized:
    """A policy's quantized sites and the plan that they fulfil."""

    plan: Plan
    sites: list[PackedSite]


def quantize_policy(
    policy: QuantizablePolicy,
    recipe: Recipe,
    observations: Observation | None,
    *,
    noise_seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
    on_progress: OnProgress = lambda what, share: None,
) -> Quantized:
    """Quantize every linear that the recipe says.

    `observations`: calibration observations; may be None for recipes without calibration.

    Raises `RecipeError` if the recipe does not fit the policy, `CalibrationError` if a statistic is missing or
    not finite or a weight is not finite.
    """
    plan = build_plan(recipe, policy)
    passes = _passes(plan, policy, memory_budget)
    packed: list[PackedSite] = []
    for sites in passes:
        statistics: dict[str, SiteStatistics] = {}
        needs = {
            _input_site(site): Needs(plan.spec(site).needs_hessian, plan.spec(site).needs_samples)
            for site in sites
            if plan.spec(site).needs_calibration
        }
        if needs:
            if observations is None:
                raise CalibrationError(f"recipe {recipe.name!r} needs calibration observations")
            on_progress("gathering statistics", len(packed) / len(plan.sites))
            statistics = collect(policy, needs, observations, noise_seed=noise_seed)
        for site in sites:
            on_progress(site.block, len(packed) / len(plan.sites))
            packed.append(quantize_site(site, plan.spec(site), policy, statistics.get(site.name)))
            statistics.pop(site.name, None)
    on_progress("done", 1.0)
    return Quantized(plan, packed)


def quantize_site(
    site: PlannedSite, spec: LinearSpec, policy: QuantizablePolicy, statistics: SiteStatistics | None
) -> PackedSite:
    """Fit the transform, fold it into the weights, round them, and fix the calibrated activation scales."""
    modules = {name: policy.module.get_submodule(name) for name in site.linears}
    weights: dict[str, Tensor] = {}
    for name, module in modules.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not weight.isfinite().all():
            raise CalibrationError(f"{name} contains NaN or infinity; the source checkpoint is damaged")
        weights[name] = weight.detach().double()
    transform = _fit(spec, torch.cat(list(weights.values())), statistics)
    hessian = None
    if spec.weight.rounding == "gptq":
        assert statistics is not None and statistics.hessian is not None
        hessian = transform.hessian(statistics.hessian)
    linears = []
    for name, weight in weights.items():
        codes, scale = _round(transform.fold(weight), hessian, spec)
        bias = getattr(modules[name], "bias", None)
        packed = pack(codes, spec.weight.bits)
        linears.append(PackedLinear(name, packed, scale.to(SCALE_DTYPE), None if bias is None else bias.detach()))
    tensors = {
        "permutation": transform.permutation,
        "rotation": transform.matrices,
        "smoothing": transform.smoothing,
        "folded": transform.folded,
        "step_scale": _step_scale(spec.activation, transform, statistics, policy.denoising_steps),
    }
    present = {key: value for key, value in tensors.items() if value is not None}
    return PackedSite(site.name, site.part, site.in_features, spec, tuple(linears), present)


def _fit(spec: LinearSpec, weight: Tensor, statistics: SiteStatistics | None) -> Transform:
    smoothing = None
    if spec.transform.smoothing is not None:
        assert statistics is not None and statistics.peak is not None
        smoothing = smoothing_factor(statistics.peak, weight, spec.transform.smoothing)
    transform = fit_transform(
        weight,
        rotation=spec.transform.rotation,
        block_size=spec.transform.block_size,
        balance=spec.transform.permutation == "zigzag",
        smoothing=smoothing,
    )
    if spec.transform.folded_percentile is None:
        return transform
    assert statistics is not None
    tokens = transform.apply(torch.cat(list(statistics.samples.values())))
    factor = percentile(tokens, spec.transform.folded_percentile)
    return transform.with_folded(factor.clamp(min=factor.mean() * 1e-3))


def _round(weight: Tensor, hessian: Tensor | None, spec: LinearSpec) -> tuple[Tensor, Tensor]:
    bits, group, search = spec.weight.bits, spec.weight.group_size, spec.weight.scale_search
    if hessian is not None:
        return gptq(weight, hessian, bits=bits, group_size=group, search=search, damping=spec.weight.damping)
    scale = weight_scale(weight, bits, group, search)
    return quantize(weight, scale, bits), scale


def _step_scale(
    spec: ActivationSpec, transform: Transform, statistics: SiteStatistics | None, steps: int
) -> Tensor | None:
    """Calibrated activation scales, float32 [steps or 1, in or 1] (Ω-QVLA Eq. 10)."""
    if spec.mode == "dynamic":
        return None
    assert statistics is not None
    if spec.mode == "static":
        tokens = [torch.cat(list(statistics.samples.values()))]
    elif set(statistics.samples) == set(range(steps)):
        tokens = [statistics.samples[step] for step in range(steps)]
    else:
        raise CalibrationError(f"{statistics.name} does not run in denoising steps; its scales cannot be per step")
    rows = []
    for samples in tokens:
        transformed = transform.apply(samples)
        if spec.granularity == "tensor":
            transformed = transformed.reshape(-1, 1)
        rows.append(percentile(transformed, spec.percentile) / qmax(spec.bits))
    return torch.stack(rows).float()


def _input_site(site: PlannedSite) -> InputSite:
    return InputSite(site.name, site.part, site.block, site.linears)


def _passes(plan: Plan, policy: QuantizablePolicy, budget: int) -> list[list[PlannedSite]]:
    """Sites in execution order, cut between blocks so that the statistics of a pass stay within the budget."""
    passes: list[list[PlannedSite]] = []
    used = 0
    for block in dict.fromkeys(site.block for site in plan.sites):
        sites = [site for site in plan.sites if site.block == block]
        size = sum(_statistics_bytes(plan, site, policy) for site in sites)
        if not passes or used + size > budget:
            passes.append([])
            used = 0
        passes[-1] += sites
        used += size
    return passes


def _statistics_bytes(plan: Plan, site: PlannedSite, policy: QuantizablePolicy) -> int:
    spec = plan.spec(site)
    steps = policy.denoising_steps if site.part == "action" else 1
    rows = site.in_features * spec.needs_hessian + MAX_SAMPLES * steps * spec.needs_samples
    return 4 * site.in_features * rows
