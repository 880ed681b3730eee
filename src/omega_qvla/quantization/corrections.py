"""Attention temperature matching and output head balancing (QuantVLA §3.3).

Quantization changes how far the logits of an attention spread, which is the temperature of its softmax, and how
much energy its output brings to the residual stream. One factor per head on the queries and one per layer on the
output take both back to what they are in full precision. The factors go into the dequantization scales, or
into the weights of a projection that is kept in floating point: the running policy has no new operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from omega_qvla.calibration.batches import calibration_batches
from omega_qvla.calibration.statistics import CalibrationError
from omega_qvla.numerics.correction import centred_logit_power, ratio
from omega_qvla.pack.site import PackedLinear, PackedSite
from omega_qvla.policy import Attention, Observation, QuantizablePolicy
from omega_qvla.runtime import installed
from omega_qvla.spec import CorrectionSpec, RecipeError


@dataclass(frozen=True)
class Corrections:
    """What the outputs of linears are multiplied by."""

    temperature: dict[str, Tensor] = field(default_factory=dict)
    """α of each head, float64 [heads], by the linear that makes the queries."""
    balance: dict[str, float] = field(default_factory=dict)
    """β by the linear from the heads to the residual stream."""

    def factors(self) -> dict[str, Tensor]:
        """Factors, float64 [n], of n equal runs of neighbouring outputs, by linear; only those that are not all 1."""
        balance = {name: torch.tensor([beta], dtype=torch.float64) for name, beta in self.balance.items()}
        return {name: factor for name, factor in (self.temperature | balance).items() if (factor != 1).any()}


def correctable(policy: QuantizablePolicy, spec: CorrectionSpec) -> list[Attention]:
    """The attentions of the corrections' part. Raises `RecipeError` if there is none."""
    attentions = [attention for attention in policy.attentions() if attention.part == spec.part]
    if not attentions:
        raise RecipeError(f"corrections.part = {spec.part!r}: the policy offers no attention there to correct")
    return attentions


def fit_corrections(
    policy: QuantizablePolicy,
    sites: list[PackedSite],
    spec: CorrectionSpec,
    observations: Observation,
    *,
    noise_seed: int = 0,
) -> Corrections:
    """α and β for every attention of `spec.part`, so that quantizing `sites` leaves spread and energy as they are.

    The floating-point policy is the teacher; the student is the same policy with `sites` in place, on the same
    observations and noise. α is fitted first, β with α in place, so that β sees the attention that will run. All
    layers are fitted at once, as in the paper: a layer's factor also answers for drift that it inherits. Factors
    multiply the student's queries and outputs, which brings back the teacher's spread; Eq. 12 and 17 print
    divisions. The policy is afterwards as it was.

    Raises `RecipeError` if the policy has no attention in that part, `CalibrationError` if an attention never ran or
    returns no weights, or if no factor can restore it: its statistics are not finite, or quantization has reduced
    one to zero.
    """
    attentions = correctable(policy, spec)
    teacher = _measure(policy, attentions, observations, noise_seed)
    temperature: dict[str, Tensor] = {}
    balance: dict[str, float] = {}
    if spec.temperature:
        with _student(policy, sites, Corrections()):
            student = _measure(policy, attentions, observations, noise_seed)
        for attention, a, b in zip(attentions, teacher, student, strict=True):
            temperature[attention.query] = _ratio(f"logits of {attention.name}", a.spread, b.spread, spec)
    if spec.balance:
        with _student(policy, sites, Corrections(temperature)):
            student = _measure(policy, attentions, observations, noise_seed)
        for attention, a, b in zip(attentions, teacher, student, strict=True):
            balance[attention.output] = _ratio(f"output of {attention.name}", a.rms, b.rms, spec).item()
    return Corrections(temperature, balance)


def apply_corrections(
    corrections: Corrections, sites: list[PackedSite], policy: QuantizablePolicy
) -> tuple[list[PackedSite], dict[str, Tensor]]:
    """The sites with corrected linears, and the corrected tensors of linears kept in floating point.

    The latter have the names and dtypes of the checkpoint. What is multiplied by 1 stays the same bit for bit.

    Raises `KeyError` if a linear is neither in the sites nor in the policy's checkpoint.
    """
    factors = corrections.factors()
    corrected = [
        replace(site, linears=tuple(_corrected(linear, factors.get(linear.name)) for linear in site.linears))
        for site in sites
    ]
    kept = factors.keys() - {linear.name for site in sites for linear in site.linears}
    changed: dict[str, Tensor] = {}
    if kept:
        stored = policy.stored_tensors()
        names = set(stored.names())
        for linear in sorted(kept):
            own = [name for name in (f"{linear}.weight", f"{linear}.bias") if name in names]
            if not own:
                raise KeyError(f"{linear}.weight is neither quantized nor in the policy's checkpoint")
            changed |= {name: _times_rows(stored.read(name), factors[linear]) for name in own}
    return corrected, changed


class _Statistics:
    """Of one attention module, accumulated call by call."""

    def __init__(self, heads: int) -> None:
        self._logits = torch.zeros(2, heads, dtype=torch.float64)
        self._output = torch.zeros(2, dtype=torch.float64)

    def add(self, output: Tensor, weights: Tensor) -> None:
        self._logits += torch.stack(centred_logit_power(weights))
        self._output += torch.stack([output.double().square().sum(), torch.tensor(output.numel())])

    @property
    def ran(self) -> bool:
        return bool(self._output[1] > 0)

    @property
    def spread(self) -> Tensor:
        """Standard deviation of each head's logits within rows, float64 [heads]."""
        return (self._logits[0] / self._logits[1]).sqrt()

    @property
    def rms(self) -> Tensor:
        """Root mean square of the output, float64 []."""
        return (self._output[0] / self._output[1]).sqrt()


def _measure(
    policy: QuantizablePolicy, attentions: list[Attention], observations: Observation, noise_seed: int
) -> list[_Statistics]:
    """Statistics of the attentions over all observations and denoising steps."""
    statistics = [_Statistics(attention.heads) for attention in attentions]

    def listener(attention: Attention, collected: _Statistics) -> Callable[..., None]:
        def listen(module: nn.Module, inputs: object, result: tuple[Tensor, Tensor | None]) -> None:
            output, weights = result
            if weights is None:
                raise CalibrationError(f"{attention.name} returns no attention weights: run it in eager attention")
            collected.add(output.detach(), weights.detach())

        return listen

    handles = [
        policy.module.get_submodule(attention.name).register_forward_hook(listener(attention, collected))
        for attention, collected in zip(attentions, statistics, strict=True)
    ]
    try:
        for batch, noise in calibration_batches(policy, observations, noise_seed):
            policy.infer(batch, noise)
    finally:
        for handle in handles:
            handle.remove()
    for attention, collected in zip(attentions, statistics, strict=True):
        if not collected.ran:
            raise CalibrationError(f"{attention.name} never ran on the calibration observations")
    return statistics


@contextmanager
def _student(policy: QuantizablePolicy, sites: list[PackedSite], corrections: Corrections) -> Iterator[None]:
    """While open, the policy is quantized and corrected."""
    corrected, changed = apply_corrections(corrections, sites, policy)
    with installed(policy.module, corrected, policy.step), _replaced(policy.module, changed):
        yield


@contextmanager
def _replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, parameters have other values, in their own dtypes."""
    parameters = {name: module.get_parameter(name) for name in tensors}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = tensors[name].to(parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = originals[name]


def _ratio(what: str, teacher: Tensor, student: Tensor, spec: CorrectionSpec) -> Tensor:
    try:
        return ratio(teacher, student, limit=spec.limit, dead_band=spec.dead_band)
    except ValueError as error:
        raise CalibrationError(f"{what}: {error}") from error


def _corrected(linear: PackedLinear, factor: Tensor | None) -> PackedLinear:
    """A packed linear whose outputs are multiplied. Codes are untouched.

    Where an output rotation mixes the rows of the weight, its columns are the outputs.
    """
    if factor is None:
        return linear
    bias = None if linear.bias is None else _times_rows(linear.bias, factor)
    tensors = dict(linear.tensors)
    if "output_rotation" in tensors:
        blocks = tensors["output_rotation"]
        by_output = _times_rows(blocks.mT.flatten(0, 1), factor)
        tensors["output_rotation"] = by_output.view_as(blocks).mT.contiguous()
        return replace(linear, bias=bias, tensors=tensors)
    if "low_rank_up" in tensors:
        tensors["low_rank_up"] = _times_rows(tensors["low_rank_up"], factor)
    return replace(linear, scale=_times_rows(linear.scale, factor), bias=bias, tensors=tensors)


def _times_rows(tensor: Tensor, factor: Tensor) -> Tensor:
    """A tensor [out, ...] with its n equal runs of rows multiplied by factor [n], in its dtype."""
    rows = factor.repeat_interleave(len(tensor) // len(factor))
    return (tensor.double() * rows.view(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)
