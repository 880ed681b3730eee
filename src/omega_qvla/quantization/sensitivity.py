"""What rounding one output channel does to the actions, and the widths that follow from it (QVLA §3.3).

The cost of giving channel c of a linear b bits is E‖ΔA‖², summed over the chunk of normalized actions, mean over
observations (Eq. 4). To first order it is σ²_{c,b} · ‖∂A/∂y_c‖²_F with the error's variance σ² (Appendix G);
channels that matter most are measured by rounding them. Both estimate the same quantity, in the same unit, so one
can stand in for the other.

The first-order cost takes errors at different tokens and denoising steps for uncorrelated. Errors of one weight
that is used in every step are not: there it is too low, by up to the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from omega_qvla.calibration.batches import BATCH, calibration_batches
from omega_qvla.calibration.statistics import CalibrationError
from omega_qvla.numerics.allocation import RankAgreement, allocate, rank_agreement
from omega_qvla.numerics.quantizer import dequantize, quantize, weight_scale
from omega_qvla.policy import Observation, QuantizablePolicy
from omega_qvla.spec import CHANNEL_WIDTHS, AllocationSpec

_RANKED = CHANNEL_WIDTHS.index(4)
"""Channels are ranked by their cost at four bits."""

Rounding = Callable[[Tensor, int], Tensor]
"""Rows [rows, in] as a number of bits gives them back, each row for itself."""


@dataclass(frozen=True)
class ChannelNoise:
    """What rounding does to the output of one linear."""

    variance: Tensor
    """σ², mean squared error of each channel at each of CHANNEL_WIDTHS, float64 [out, 5]."""
    rounding: Rounding
    """What makes the error."""


@dataclass(frozen=True)
class Remeasured:
    """A channel whose cost was measured by rounding it; both costs are at four bits."""

    linear: str
    channel: int
    proxy: float
    exact: float


@dataclass(frozen=True)
class Sensitivity:
    """Costs of all channels that compete for one budget."""

    linears: tuple[str, ...]
    costs: dict[str, Tensor]
    """E‖ΔA‖² of each channel at each of CHANNEL_WIDTHS, float64 [out, 5], by linear."""
    agreement: RankAgreement | None
    """Between first order and measurement, over the channels measured; None for fewer than two."""
    remeasured: tuple[Remeasured, ...]
    """Most sensitive channel first."""


def round_rows(rows: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """Rows [rows, in] rounded to nearest with their peak's scale per row or group, in their dtype.

    16 bits: the nearest bfloat16. 0 bits: zeros.
    """
    if bits == 0:
        return torch.zeros_like(rows)
    if bits == 16:
        return rows.to(torch.bfloat16).to(rows.dtype)
    scale = weight_scale(rows, bits, group_size)
    return dequantize(quantize(rows, scale, bits), scale)


def channel_noise(weight: Tensor, hessian: Tensor, tokens: int, rounding: Rounding = round_rows) -> ChannelNoise:
    """The errors of W [out, in] on the tokens of which H = XᵀX [in, in]: σ²_{c,b} = Δw H Δwᵀ / tokens."""
    weight, hessian = weight.detach().double(), hessian.double()
    variances = []
    for bits in CHANNEL_WIDTHS:
        delta = rounding(weight, bits) - weight
        # H was summed in float32: where the error is nearly nothing the form can fall below zero.
        variances.append(((delta @ hessian) * delta).sum(1).clamp(min=0) / tokens)
    return ChannelNoise(torch.stack(variances, 1), rounding)


def measure_sensitivity(
    policy: QuantizablePolicy,
    noises: Mapping[str, ChannelNoise],
    observations: Observation,
    spec: AllocationSpec,
    *,
    noise_seed: int = 0,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> Sensitivity:
    """Costs of all channels of the linears that `noises` names.

    Gains ‖∂A/∂y_c‖²_F, summed over tokens and denoising steps, are estimated on `spec.observations` evenly spaced
    observations (all, if there are fewer) in `spec.directions` random directions each. The `spec.remeasured`
    channels with the largest cost at four bits are then rounded one at a time, on up to 8 of the observations. As
    gains differ greatly between observations, these costs are scaled by the ratio of the channel's gains on all and
    on those 8, which makes them comparable with the others. At 16 bits the first-order cost stays; it is 0 for
    weights stored in two bytes. A channel that nothing reads costs nothing. The policy is afterwards as it was.

    Raises `CalibrationError` if there are no observations, or for a linear that never ran or whose gradient is
    not finite.
    """
    if not len(observations):
        raise CalibrationError("there are no calibration observations to measure sensitivities on")
    probe = ActionProbe(policy, evenly_spread(observations, spec.observations), noise_seed)
    gains = probe.gains(
        list(noises), spec.directions, lambda share: on_progress("gradients of the actions", share / 2)
    )
    costs = {name: noise.variance * gains[name][:, None] for name, noise in noises.items()}
    remeasured = _remeasure(
        probe, noises, gains, costs, spec, lambda share: on_progress("effects on the actions", (1 + share) / 2)
    )
    on_progress("done", 1.0)
    return Sensitivity(tuple(noises), costs, _agreement(remeasured), tuple(remeasured))


def allocate_bits(sensitivity: Sensitivity, in_features: Mapping[str, int], average_bits: float) -> dict[str, Tensor]:
    """Width of every channel, uint8 [out] by linear, under one budget for all of them (`numerics.allocation`).

    `in_features`: input width by linear. Raises `KeyError` for a linear without one, `ValueError` for a budget
    outside 0..16 or costs that are not finite.
    """
    costs = [sensitivity.costs[name] for name in sensitivity.linears]
    rows = [len(cost) for cost in costs]
    sizes = torch.tensor([in_features[name] for name in sensitivity.linears])
    widths = allocate(torch.cat(costs), sizes.repeat_interleave(torch.tensor(rows)), average_bits)
    return dict(zip(sensitivity.linears, widths.split(rows), strict=True))


def evenly_spread(observations: Observation, count: int) -> Observation:
    """At most `count` observations at even distances."""
    step = max(1, len(observations) // count)
    return observations[::step][:count]


class ActionProbe:
    """The actions of a policy for some observations, and what they depend on.

    The policy is afterwards as it was.
    """

    def __init__(self, policy: QuantizablePolicy, observations: Observation, noise_seed: int) -> None:
        self._policy, self._observations, self._noise_seed = policy, observations, noise_seed
        self._batches = list(calibration_batches(policy, observations, noise_seed))

    def on_few(self) -> ActionProbe:
        """The same with at most one batch of the observations."""
        return ActionProbe(self._policy, evenly_spread(self._observations, BATCH), self._noise_seed)

    def gains(
        self, linears: list[str], directions: int, on_share: Callable[[float], None] = lambda share: None
    ) -> dict[str, Tensor]:
        """‖∂A/∂y_c‖²_F summed over tokens and steps, mean over observations, float64 [out] by linear.

        For random signs v the mean square of ∂(vᵀA)/∂y_c is ‖∂A/∂y_c‖²_F (Hutchinson 1990).
        """
        generator = torch.Generator().manual_seed(self._noise_seed)
        count = len(self._observations)
        with _listening(self._policy.module, linears) as squares:
            for done, (batch, noise) in enumerate(self._batches):
                on_share(done / len(self._batches))
                actions = self._policy.differentiable_actions(batch, noise)
                if actions.requires_grad:  # else they depend on none of the linears
                    for left in reversed(range(directions)):
                        signs = 2 * torch.randint(2, actions.shape, generator=generator).to(actions.dtype) - 1
                        actions.backward(signs, retain_graph=left > 0)
        for name in linears:
            if name not in squares:
                raise CalibrationError(f"{name} has no sensitivity: it never ran on the calibration observations")
            if not squares[name].isfinite().all():
                raise CalibrationError(f"the gradient of the actions at {name} contains NaN or infinity")
        return {name: squares[name] / (count * directions) for name in linears}

    @torch.no_grad()
    def effects(self, linear: str, channel: int, rounding: Rounding) -> Tensor:
        """E‖ΔA‖² with one channel rounded to each width but 16, on the first batch, float64 [4]."""
        weight = self._policy.module.get_submodule(linear).weight
        assert isinstance(weight, Tensor)
        reference, original = self._reference, weight[channel].clone()
        effects = []
        try:
            for bits in CHANNEL_WIDTHS[1:]:
                weight[channel] = rounding(original[None].double(), bits)[0]
                change = self._first_actions() - reference
                effects.append(change.double().square().sum() / len(change))
        finally:
            weight[channel] = original
        return torch.stack(effects)

    @cached_property
    def _reference(self) -> Tensor:
        """Actions of the first batch with all weights as they are."""
        return self._first_actions()

    def _first_actions(self) -> Tensor:
        return self._policy.differentiable_actions(*self._batches[0])


@contextmanager
def _listening(module: nn.Module, linears: list[str]) -> Iterator[dict[str, Tensor]]:
    """While open, backward passes add the squared gradients of the linears' outputs to what is yielded, float64
    [out] by linear; parameters take no gradients."""
    squares: dict[str, Tensor] = {}

    def listener(name: str) -> Callable[..., Tensor]:
        def collect(gradient: Tensor) -> None:
            squares[name] += gradient.double().square().flatten(0, -2).sum(0)

        def listen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            squares.setdefault(name, torch.zeros(output.shape[-1], dtype=torch.float64))
            output.requires_grad_()  # by itself it does not if no linear before it is listened to
            output.register_hook(collect)
            return output.clone()  # what follows may write to it, which the start of a graph does not allow

        return listen

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    handles = [module.get_submodule(name).register_forward_hook(listener(name)) for name in linears]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield squares
    finally:
        for parameter in trained:
            parameter.requires_grad_()
        for handle in handles:
            handle.remove()


def _remeasure(
    probe: ActionProbe,
    noises: Mapping[str, ChannelNoise],
    gains: Mapping[str, Tensor],
    costs: dict[str, Tensor],
    spec: AllocationSpec,
    on_share: Callable[[float], None],
) -> list[Remeasured]:
    """Replace, in place, the largest costs at four bits by what rounding these channels does."""
    if not spec.remeasured:
        return []
    few = probe.on_few()
    gains_on_few = few.gains(list(noises), spec.directions)
    chosen = _most_sensitive(costs, gains_on_few, spec.remeasured)
    remeasured = []
    for done, (name, channel) in enumerate(chosen):
        on_share(done / len(chosen))
        proxy = float(costs[name][channel, _RANKED])
        ratio = gains[name][channel] / gains_on_few[name][channel]
        costs[name][channel, 1:] = ratio * few.effects(name, channel, noises[name].rounding)
        remeasured.append(Remeasured(name, channel, proxy, float(costs[name][channel, _RANKED])))
    return remeasured


def _most_sensitive(costs: Mapping[str, Tensor], gains: Mapping[str, Tensor], count: int) -> list[tuple[str, int]]:
    """Linear and channel of the `count` largest costs at four bits, largest first, among those with a gain."""
    channels = [(name, channel) for name, cost in costs.items() for channel in range(len(cost))]
    ranked = torch.cat([cost[:, _RANKED] * (gains[name] > 0) for name, cost in costs.items()])
    order = ranked.argsort(descending=True, stable=True)[:count].tolist()
    return [channels[i] for i in order if ranked[i] > 0]


def _agreement(remeasured: list[Remeasured]) -> RankAgreement | None:
    if len(remeasured) < 2:
        return None
    return rank_agreement(
        torch.tensor([channel.proxy for channel in remeasured]),
        torch.tensor([channel.exact for channel in remeasured]),
    )
