"""Quantizing the linears of one input site: fit the transform, fold it, round, fix the activation scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omega_qvla.calibration.statistics import CalibrationError, SiteStatistics
from omega_qvla.numerics.gptq import gptq_blockwise, hessian_factor, round_with_factor, solver_dtype
from omega_qvla.numerics.low_rank import low_rank
from omega_qvla.numerics.quantizer import SCALE_DTYPE, peak_scale, percentile, qmax, quantize, storable, weight_scale
from omega_qvla.numerics.rotation import output_rotation, rotate_outputs
from omega_qvla.numerics.saliency import searched_factor
from omega_qvla.numerics.smoothing import smoothing_factor
from omega_qvla.numerics.transform import ROTATION_DTYPE, Transform, fit_transform
from omega_qvla.pack.bits import pack
from omega_qvla.pack.manifest import PlannedSite
from omega_qvla.pack.rows import pack_rows, rows_of
from omega_qvla.pack.site import PackedLinear, PackedSite
from omega_qvla.spec import CHANNEL_WIDTHS, ActivationSpec, LinearSpec, WeightSpec

LOW_RANK_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Found:
    """What was found out about a site before its linears are rounded; each piece where its recipe asks for it."""

    statistics: SiteStatistics | None = None
    widths: dict[str, Tensor] = field(default_factory=dict)
    """Allocated bits of each output channel, uint8 [out] by linear."""
    smoothing: Tensor | None = None
    """Learned factor of each input channel, float32 [in]."""
    clipping: dict[str, Tensor] = field(default_factory=dict)
    """Learned share of the peak that a scale reaches, float32 [out, groups] by linear."""

    def hessian(self) -> Tensor:
        assert self.statistics is not None and self.statistics.hessian is not None
        return self.statistics.hessian


def quantize_site(
    site: PlannedSite,
    spec: LinearSpec,
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    found: Found,
    denoising_steps: int,
) -> PackedSite:
    """Fit the transform, fold it into the weights, round them, and fix the calibrated activation scales.

    `weights`: [out, in] of the site's linears by name; `biases`: [out] of those that have one.

    Raises `CalibrationError` naming the site or linear if a weight or statistic is not finite, or a solver fails.
    """
    try:
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise CalibrationError(f"{name} contains NaN or infinity; the source checkpoint is damaged")
        transform = _fit(spec, list(weights.values()), found)
        second_order = _second_order(spec, transform, found)
        linears = tuple(
            _quantize_linear(
                name,
                weight.to(solver_dtype(site.in_features)),
                biases.get(name),
                spec,
                transform,
                second_order,
                found,
            )
            for name, weight in weights.items()
        )
        tensors = {
            "smoothing": transform.smoothing,
            "first_rotation": transform.first_matrices,
            "permutation": transform.permutation,
            "rotation": transform.matrices,
            "folded": transform.folded,
            "step_scale": _step_scale(spec.activation, transform, found.statistics, denoising_steps),
        }
    except CalibrationError:
        raise
    except ValueError as error:
        raise CalibrationError(f"{site.name}: {error}") from error
    present = {key: value for key, value in tensors.items() if value is not None}
    return PackedSite(site.name, site.part, site.in_features, spec, linears, present)


def _second_order(spec: LinearSpec, transform: Transform, found: Found) -> Tensor | None:
    """What the rounding asks to know of the transformed inputs: the Hessian [in, in], or for GPTQ its factor."""
    if not spec.needs_hessian:
        return None
    assert found.statistics is not None
    hessian = found.hessian()
    hessian = transform.hessian(hessian.to(solver_dtype(len(hessian))))
    found.statistics.forget_hessian()  # it takes a gigabyte where a layer is 16,384 wide
    if spec.weight.rounding == "gptq":
        return hessian_factor(hessian, spec.weight.damping, overwrite=True)
    return hessian


def _fit(spec: LinearSpec, weights: list[Tensor], found: Found) -> Transform:
    stacked = torch.cat(weights)
    stacked = stacked.to(solver_dtype(stacked.shape[1]))
    transform = fit_transform(
        stacked,
        rotation=spec.transform.rotation,
        block_size=spec.transform.block_size,
        permutation=spec.transform.permutation,
        smoothing=_smoothing(spec, weights, found),
        first_rotation=spec.transform.first_rotation,
    )
    if spec.transform.folded_percentile is None:
        return transform
    assert found.statistics is not None
    tokens = transform.apply(torch.cat(list(found.statistics.samples.values())))
    factor = percentile(tokens, spec.transform.folded_percentile)
    return transform.with_folded(factor.clamp(min=factor.mean() * 1e-3))


def _smoothing(spec: LinearSpec, weights: list[Tensor], found: Found) -> Tensor | None:
    match spec.transform.smoothing:
        case None:
            return None
        case "learned":
            assert found.smoothing is not None
            return found.smoothing
        case "search":
            statistics = found.statistics
            assert statistics is not None and statistics.magnitude is not None
            mean = statistics.magnitude / statistics.tokens
            bits, group = spec.weight.bits, spec.weight.group_size
            hessian, doubles = found.hessian().double(), [weight.double() for weight in weights]
            return searched_factor(mean, doubles, hessian, bits=bits, group_size=group)
        case alpha:
            assert found.statistics is not None and found.statistics.peak is not None
            return smoothing_factor(found.statistics.peak, torch.cat(weights), alpha)


def _quantize_linear(
    name: str,
    original: Tensor,
    bias: Tensor | None,
    spec: LinearSpec,
    transform: Transform,
    second_order: Tensor | None,
    found: Found,
) -> PackedLinear:
    weight = transform.fold(original)
    tensors: dict[str, Tensor] = {}
    if spec.transform.output_rotation != "none":
        # Fitted to the rows as they are in the source, as the released code of Ω-QVLA and DuQuant do it.
        back = output_rotation(spec.transform.output_rotation, original, spec.transform.block_size)
        tensors["output_rotation"] = back.to(ROTATION_DTYPE).contiguous()
        weight = rotate_outputs(weight, tensors["output_rotation"])
    if spec.weight.rank:
        up, down = (factor.to(LOW_RANK_DTYPE) for factor in low_rank(weight, spec.weight.rank))
        tensors |= {"low_rank_up": up.contiguous(), "low_rank_down": down.contiguous()}
        weight = weight - up.double() @ down.double()
    if spec.weight.mixed:
        widths = found.widths[name] if spec.weight.allocation else torch.full((len(weight),), 16, dtype=torch.uint8)
        tensors["widths"] = widths
        packed, scale = _round_rows(weight, widths, spec.weight, second_order)
    else:
        codes, scale = _round(weight, second_order, spec.weight, found.clipping.get(name))
        packed = pack(codes, spec.weight.bits)
    return PackedLinear(name, packed, scale.to(SCALE_DTYPE), None if bias is None else bias.detach(), tensors)


def _round(
    weight: Tensor, second_order: Tensor | None, spec: WeightSpec, clipping: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales [out, groups]."""
    bits, group, codes, search = spec.bits, spec.group_size, spec.codes, spec.scale_search
    if search == "learned":
        assert clipping is not None
        scale = storable(peak_scale(weight, bits, group) * clipping.double())
        return quantize(weight, scale, bits, codes), scale
    if spec.rounding == "gptq":
        assert second_order is not None
        return round_with_factor(weight, second_order, bits=bits, group_size=group, search=search, codes=codes)
    if spec.rounding == "gptq_blockwise":
        assert second_order is not None
        return gptq_blockwise(weight, second_order, bits=bits, damping=spec.damping, codes=codes)
    scale = weight_scale(weight, bits, group, search, second_order, codes)
    return quantize(weight, scale, bits, codes), scale


def _round_rows(weight: Tensor, widths: Tensor, spec: WeightSpec, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
    """Packed rows uint8 [bytes] and scales [out, groups]: 1 for rows of 16 bits, 0 for pruned ones."""
    rows: dict[int, Tensor] = {}
    scale = torch.zeros(len(weight), weight.shape[1] // (spec.group_size or weight.shape[1]), dtype=weight.dtype)
    for width in CHANNEL_WIDTHS[:-1]:
        which = rows_of(widths, width)
        if not len(which):
            continue
        if width == 16:
            rows[width], scale[which] = weight[which], 1.0
        else:
            search = spec.scale_search
            assert search != "learned"
            scale[which] = weight_scale(weight[which], width, spec.group_size, search, hessian, spec.codes)
            rows[width] = quantize(weight[which], scale[which], width, spec.codes)
    return pack_rows(rows), scale


def _step_scale(
    spec: ActivationSpec, transform: Transform, statistics: SiteStatistics | None, steps: int
) -> Tensor | None:
    """Calibrated activation scales, float32 [steps or 1, in or 1] (Ω-QVLA Eq. 10)."""
    if not spec.calibrated:
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
