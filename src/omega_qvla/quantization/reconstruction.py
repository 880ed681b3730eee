"""Learned scaling and clipping by reconstructing the output of a block (OmniQuant, Shao et al. 2024).

A linear computes (X / s) (W · s)ᵀ on rounded factors. Learned are the factor s of each input channel (learnable
equivalent transformation, §3.3) and the share γ of its peak to which a group of weights is clipped (learnable
weight clipping, §3.2). Both are optimized for the output of the whole block (Eq. 1) on its inputs in the
floating-point policy; gradients pass through rounding as if it were not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from omega_qvla.calibration.replay import BlockCall
from omega_qvla.calibration.statistics import CalibrationError
from omega_qvla.numerics.quantizer import peak_scale, qmax, storable
from omega_qvla.pack.manifest import PlannedSite
from omega_qvla.policy import QuantizablePolicy
from omega_qvla.spec import Codes, LinearSpec, RecipeError

LEARNING_RATE = 5e-3
"""Of Adam (Ω-QVLA Table 5)."""
ITERATIONS = 200
"""Steps of Adam (Ω-QVLA Table 5)."""
_INTERVAL = 25
_INITIAL_LOGIT = 4.0
"""Clipping starts at γ = sigmoid(4) = 0.98, as in the code released with OmniQuant."""
_LEARNABLE: dict[str, tuple[Any, ...]] = {
    "transform.smoothing": ("learned", None),
    "transform.first_rotation": ("none",),
    "transform.permutation": ("none",),
    "transform.rotation": ("none",),
    "transform.folded_percentile": (None,),
    "transform.output_rotation": ("none",),
    "weight.scale_search": ("learned", "max"),
    "weight.rounding": ("rtn",),
    "weight.rank": (0,),
    "weight.allocation": (None,),
}


@dataclass(frozen=True)
class Learned:
    """What was learned for a block, and the mean squared error of its output over all recorded calls."""

    smoothing: dict[str, Tensor]
    """s > 0 by site, float32 [in], for sites with smoothing `learned`."""
    clipping: dict[str, Tensor]
    """γ in (0, 1] by linear, float32 [out, groups], for scale_search `learned`: the stored scale is
    γ · peak(W · s) / qmax."""
    start: float
    """With s = 1 and γ = 1, which is rounding to nearest."""
    end: float
    """With what was learned; never above `start`."""


def reconstruct(
    policy: QuantizablePolicy,
    sites: Sequence[PlannedSite],
    specs: Mapping[str, LinearSpec],
    calls: Sequence[BlockCall],
    *,
    iterations: int = ITERATIONS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> Learned:
    """Learn s and γ for those of a block's `sites` whose spec (`specs`, by site) asks for it.

    All other linears of the block stay in floating point. An iteration sees one of the recorded `calls`, drawn
    with `seed`. All calls are evaluated at the start, every 25 iterations and at the end, and the best of these
    states is returned. The policy is not modified.

    Raises `RecipeError` as `check_learnable` does, `CalibrationError` if the block's error is not finite.
    """
    student = _Student(policy, sites, specs)
    parameters = student.parameters()
    optimizer = torch.optim.Adam(parameters.tensors(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        smoothing, clipping = parameters.ones()
        start = student.loss(calls, smoothing, clipping).item()
    best = Learned(smoothing, clipping, start, start)
    if start == 0:
        return best
    for iteration in range(1, iterations + 1):
        call = calls[int(torch.randint(len(calls), (1,), generator=generator))]
        # Divided by the first error, or the gradients of a wide block at 8 bits would be lost in Adam's ε.
        loss = student.loss([call], *parameters.values()) / start
        gradients = torch.autograd.grad(loss, parameters.tensors())
        for parameter, gradient in zip(parameters.tensors(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if iteration % _INTERVAL == 0 or iteration == iterations:
            with torch.no_grad():
                smoothing, clipping = parameters.values()
                end = student.loss(calls, smoothing, clipping).item()
            if end < best.end:
                best = Learned(smoothing, clipping, start, end)
    return best


def check_learnable(name: str, spec: LinearSpec) -> None:
    """Raises `RecipeError` if the site `name` combines what is learned with what reconstruction does not imitate."""
    if not spec.learned:
        return
    for key, allowed in _LEARNABLE.items():
        if (value := attrgetter(key)(spec)) not in allowed:
            choice = " or ".join(repr(each) for each in allowed if each is not None)
            raise RecipeError(
                f"{name}: {key} = {value!r} does not go with learned smoothing or clipping; "
                + (f"set it to {choice}" if choice else "leave it out")
            )
    if spec.activation.calibrated:
        raise RecipeError(
            f"{name}: activation.mode = {spec.activation.mode!r} does not go with learned smoothing or clipping; "
            "set it to 'dynamic', with granularity 'token' or 'token_group'"
        )
    if spec.weight.bits == 16 and spec.weight.scale_search == "learned":
        raise RecipeError(f"{name}: weight.scale_search = 'learned' has nothing to learn at weight.bits = 16")


@dataclass(frozen=True)
class _Parameters:
    """What Adam optimizes, as float32 leaves of the graph."""

    log_factors: dict[str, Tensor]
    """log s [in] by site."""
    logits: dict[str, Tensor]
    """The logit of γ [out, groups] by linear."""

    def tensors(self) -> list[Tensor]:
        return [*self.log_factors.values(), *self.logits.values()]

    def values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """s by site and γ by linear."""
        smoothing = {name: tensor.exp() for name, tensor in self.log_factors.items()}
        return smoothing, {name: tensor.sigmoid() for name, tensor in self.logits.items()}

    def ones(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """s = 1 and γ = 1."""
        smoothing = {name: torch.ones_like(tensor) for name, tensor in self.log_factors.items()}
        return smoothing, {name: torch.ones_like(tensor) for name, tensor in self.logits.items()}


class _Student:
    """A block of the policy in which the linears of learned sites are quantized."""

    def __init__(
        self, policy: QuantizablePolicy, sites: Sequence[PlannedSite], specs: Mapping[str, LinearSpec]
    ) -> None:
        self.name, self.specs = sites[0].block, specs
        self.sites = [site for site in sites if specs[site.name].learned]
        for site in self.sites:
            check_learnable(site.name, specs[site.name])
        self.block = policy.module.get_submodule(self.name)
        self.linears = {name: policy.module.get_submodule(name) for site in self.sites for name in site.linears}

    def parameters(self) -> _Parameters:
        log_factors, logits = {}, {}
        for site in self.sites:
            spec = self.specs[site.name]
            if spec.transform.smoothing == "learned":
                log_factors[site.name] = torch.zeros(site.in_features, requires_grad=True)
            if spec.weight.scale_search == "learned":
                groups = site.in_features // (spec.weight.group_size or site.in_features)
                for name in site.linears:
                    rows = len(_weight(self.linears[name]))
                    logits[name] = torch.full((rows, groups), _INITIAL_LOGIT, requires_grad=True)
        return _Parameters(log_factors, logits)

    def loss(self, calls: Sequence[BlockCall], smoothing: dict[str, Tensor], clipping: dict[str, Tensor]) -> Tensor:
        """Mean squared error of the block's output. Raises `CalibrationError` if it is not finite."""
        weights = self._weights(smoothing, clipping)
        with self._quantized_inputs(smoothing):
            errors = [mse_loss(call.run(self.block, weights).float(), call.output.float()) for call in calls]
        loss = torch.stack(errors).mean()
        if not loss.isfinite():
            raise CalibrationError(
                f"the error of {self.name} is {loss.item()} while it is reconstructed: look for NaN or infinity in "
                "its weights and its recorded output, else lower the learning rate"
            )
        return loss

    def _weights(self, smoothing: dict[str, Tensor], clipping: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ŵ [out, in] of every quantized linear, by its parameter's name in the block."""
        weights = {}
        for site in self.sites:
            spec = self.specs[site.name].weight
            for name in site.linears:
                original = _weight(self.linears[name])
                weight = original.float()
                if site.name in smoothing:
                    weight = weight * smoothing[site.name]
                if spec.bits != 16:
                    scale = peak_scale(weight, spec.bits, spec.group_size)
                    if name in clipping:
                        scale = clipping[name] * scale
                    scale = _straight_through(scale, storable(scale))
                    weight = _fake_quantize(weight, scale, spec.bits, spec.codes)
                weights[f"{name.removeprefix(self.name + '.')}.weight"] = weight.to(original.dtype)
        return weights

    @contextmanager
    def _quantized_inputs(self, smoothing: dict[str, Tensor]) -> Iterator[None]:
        """While open, the linears read X / s, rounded as their spec says."""

        def hook(site: PlannedSite) -> Callable[..., Tensor]:
            spec, factor = self.specs[site.name].activation, smoothing.get(site.name)

            def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
                x = inputs[0].float() if factor is None else inputs[0].float() / factor
                if spec.rounds:
                    x = _fake_quantize(x, peak_scale(x, spec.bits, spec.group_size), spec.bits, spec.codes)
                return x.to(inputs[0].dtype)

            return read

        handles = [
            self.linears[name].register_forward_pre_hook(hook(site)) for site in self.sites for name in site.linears
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _fake_quantize(x: Tensor, scale: Tensor, bits: int, codes: Codes) -> Tensor:
    """x̂ [..., in] of x [..., in] with scales [..., groups], differentiable in both; values as `quantize` gives."""
    grouped, scale = x.unflatten(-1, (scale.shape[-1], -1)), scale[..., None]
    scaled = grouped * (1 / torch.where(scale > 0, scale, 1))
    rounded = _straight_through(scaled, scaled.round())
    limit = qmax(bits)
    return (rounded.clamp(-limit - (codes == "full"), limit) * scale).flatten(-2)


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of x."""
    return rounded.detach() + (x - x.detach())


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
