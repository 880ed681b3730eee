"""Sensitivities against policies whose sensitivities are known, and against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.calibration import CalibrationError, Needs, collect
from omega_qvla.calibration.batches import calibration_noise
from omega_qvla.numerics.allocation import allocate
from omega_qvla.numerics.quantizer import dequantize, quantize, weight_scale
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import Observation
from omega_qvla.quantization.sensitivity import (
    ChannelNoise,
    Sensitivity,
    allocate_bits,
    channel_noise,
    measure_sensitivity,
    round_rows,
)
from omega_qvla.spec import CHANNEL_WIDTHS, AllocationSpec
from toy_policy import WIDTH, toy_observations

TOKENS, HIDDEN = 3, 6
FOUR = CHANNEL_WIDTHS.index(4)


class LinearPolicy:
    """Actions A = head(body(x)) of every token for itself, x = noise + state; nothing else runs."""

    noise_shape = (TOKENS, WIDTH)

    def __init__(self, actions: int) -> None:
        torch.manual_seed(0)
        layers = {"body": nn.Linear(WIDTH, HIDDEN), "head": nn.Linear(HIDDEN, actions), "idle": nn.Linear(2, 2)}
        self.module: Any = nn.ModuleDict(layers)
        self.seen: list[int] = []

    def inputs(self, observation: Observation, noise: Tensor) -> Tensor:
        return noise + torch.from_numpy(observation.state)[:, None]

    def differentiable_actions(self, observation: Observation, noise: Tensor) -> Tensor:
        self.seen.append(len(observation))
        return self.module["head"](self.module["body"](self.inputs(observation, noise)))


class GatedPolicy(LinearPolicy):
    """Every observation reads the same, but the state says how much that matters to the actions."""

    def inputs(self, observation: Observation, noise: Tensor) -> Tensor:
        return torch.ones(len(observation), TOKENS, WIDTH)

    def differentiable_actions(self, observation: Observation, noise: Tensor) -> Tensor:
        gate = torch.from_numpy(observation.state[:, 0])[:, None, None]
        return gate * super().differentiable_actions(observation, noise)


class OneAction:
    """A policy whose only action is one of those of another: every random direction then gives the same gradient."""

    def __init__(self, policy: PI05) -> None:
        self.module, self.noise_shape, self._policy = policy.module, policy.noise_shape, policy

    def differentiable_actions(self, observation: Observation, noise: Tensor) -> Tensor:
        return self._policy.differentiable_actions(observation, noise)[:, 1:2, 2:3]


@torch.no_grad()
def actions_with(
    policy: Any, linear: str, observations: Observation, change: Callable[[int, Tensor], None]
) -> Tensor:
    """Actions of copies of one observation while `change` sees the linear's output [B, tokens, out] at every call."""
    calls = count()
    module = policy.module.get_submodule(linear)
    handle = module.register_forward_hook(lambda module, inputs, output: change(next(calls), output))
    try:
        noise = calibration_noise(policy, 0, 0, 1)
        return policy.differentiable_actions(observations, noise.expand(len(observations), -1, -1))
    finally:
        handle.remove()


def measure(
    policy: Any, noises: dict[str, ChannelNoise], observations: Observation, remeasured: int = 0, directions: int = 1
) -> Sensitivity:
    spec = AllocationSpec(4.0, directions, len(observations) or 1, remeasured)
    return measure_sensitivity(policy, noises, observations, spec)


def noise_of_body(policy: Any, observations: Observation) -> dict[str, ChannelNoise]:
    x = policy.inputs(observations, calibration_noise(policy, 0, 0, len(observations)))
    x = x.flatten(0, -2)
    return {"body": channel_noise(policy.module["body"].weight, x.t() @ x, len(x))}


def unit_noises(policy: Any, linears: Iterable[str]) -> dict[str, ChannelNoise]:
    """Errors of variance 1, so that costs are gains."""
    rows = {name: policy.module.get_submodule(name).out_features for name in linears}
    return {name: ChannelNoise(torch.ones(out, 5, dtype=torch.float64), round_rows) for name, out in rows.items()}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 8])
def test_rows_are_rounded_with_their_peaks_scale(bits: int, group_size: int | None) -> None:
    rows = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = weight_scale(rows, bits, group_size)
    expected = dequantize(quantize(rows, scale, bits), scale)
    assert torch.equal(round_rows(rows, bits, group_size), expected)
    assert torch.equal(round_rows(rows[2:3], bits, group_size), expected[2:3])


def test_the_widths_at_the_ends() -> None:
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_rows(rows, 16), rows.bfloat16().float())
    assert round_rows(rows, 0).count_nonzero() == 0


def test_noise_is_the_mean_squared_error_of_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 16, dtype=torch.float64, generator=generator)
    x = torch.randn(40, 16, dtype=torch.float64, generator=generator)
    noise = channel_noise(weight, x.t() @ x, len(x), partial(round_rows, group_size=8))
    for column, bits in enumerate(CHANNEL_WIDTHS):
        error = x @ (round_rows(weight, bits, 8) - weight).t()
        assert torch.allclose(noise.variance[:, column], error.square().mean(0))


def test_weights_of_two_bytes_lose_nothing_at_16_bits() -> None:
    weight = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert channel_noise(weight, torch.eye(16), 1).variance[:, 0].tolist() == [0] * 7


def test_first_order_is_exact_for_a_linear_policy() -> None:
    """With one action per token there is one direction, and no random spread."""
    policy, observations = LinearPolicy(actions=1), toy_observations(8)
    noises = noise_of_body(policy, observations)
    first_order = measure(policy, noises, observations)
    assert first_order.agreement is None and first_order.remeasured == ()
    exact = measure(policy, noises, observations, remeasured=HIDDEN)
    assert torch.allclose(first_order.costs["body"], exact.costs["body"], rtol=1e-4)
    assert exact.agreement is not None and exact.agreement.spearman == pytest.approx(1)
    assert exact.agreement.near_diagonal == 1


def test_gains_are_squared_norms_of_the_jacobian() -> None:
    """Signs make a relative spread of at most √(2 / n) with n independent directions."""
    policy, observations = LinearPolicy(actions=5), toy_observations(16)
    gains = measure(policy, unit_noises(policy, ["body"]), observations, directions=50).costs
    norm = policy.module["head"].weight.detach().double().square().sum(0)
    spread = (2 / (50 * 16 * TOKENS)) ** 0.5
    assert ((gains["body"][:, 0] / (TOKENS * norm) - 1).abs() < 4 * spread).all()
    assert gains["body"].dtype == torch.float64


@pytest.mark.parametrize(
    ("ending", "channel"),
    [
        ("vision_model.encoder.layers.0.mlp.fc1", 7),
        ("language_model.layers.0.self_attn.k_proj", 3),
        ("gemma_expert.model.layers.1.mlp.down_proj", 11),
    ],
)
def test_gains_are_finite_differences(floating: PI05, observations: Observation, ending: str, channel: int) -> None:
    """Every token of every call counts: two cameras, one prompt, ten denoising steps."""
    policy, one = OneAction(floating), observations[:1]
    name = next(name for name, _ in policy.module.named_modules() if name.endswith(ending))
    gain = float(measure(policy, unit_noises(policy, [name]), one).costs[name][channel, 0])
    tokens: list[int] = []
    actions_with(policy, name, one, lambda call, output: tokens.append(output.shape[1]))
    places = [(call, token) for call, length in enumerate(tokens) for token in range(length)]
    step = 1e-2

    def shift(call: int, output: Tensor) -> None:
        """Of the copies of the observation, two for each place are moved there, up and down."""
        for copy, (moved, token) in enumerate(places):
            if moved == call:
                output[2 * copy, token, channel] += step
                output[2 * copy + 1, token, channel] -= step

    copies = Observation.concatenate([one] * (2 * len(places)))
    moved = actions_with(policy, name, copies, shift).double().flatten()
    derivatives = (moved[::2] - moved[1::2]) / (2 * step)
    assert gain == pytest.approx(float(derivatives.square().sum()), rel=0.02)


def test_what_the_actions_do_not_depend_on_is_pruned(floating: PI05, observations: Observation) -> None:
    """Of the last language layer the actions read keys and values only."""
    prefix = "model.paligemma_with_expert.paligemma.model.language_model.layers.1"
    names = [f"{prefix}.mlp.down_proj", f"{prefix}.self_attn.k_proj"]
    sites = {site: Needs(hessian=True) for site in floating.sites() if set(names) & set(site.linears)}
    statistics = collect(floating, sites, observations, noise_seed=0)
    noises = {}
    for site in sites:
        (name,) = set(names) & set(site.linears)
        found = statistics[site.name]
        assert found.hessian is not None
        weight = floating.module.get_submodule(name).weight
        noises[name] = channel_noise(weight, found.hessian, found.tokens)
    sensitivity = measure(floating, noises, observations[:2])
    unread, read = (sensitivity.costs[name] for name in names)
    assert unread.count_nonzero() == 0 and (read[:, 1:] > 0).all()
    in_features = {name: floating.module.get_submodule(name).in_features for name in names}
    widths = allocate_bits(sensitivity, in_features, 1.0)
    assert widths[names[0]].count_nonzero() == 0 and widths[names[1]].min() > 0

    alone = measure(floating, {names[0]: noises[names[0]]}, observations[:2])
    assert alone.costs[names[0]].count_nonzero() == 0


def test_the_most_sensitive_channels_are_measured() -> None:
    policy: Any = LinearPolicy(actions=4)
    observations = toy_observations(8)
    noises = noise_of_body(policy, observations)
    before, after = (measure(policy, noises, observations, remeasured=n).costs["body"] for n in (0, 2))
    sensitivity = measure(policy, noises, observations, remeasured=2)
    largest = before[:, FOUR].topk(2).indices.tolist()
    assert [channel.channel for channel in sensitivity.remeasured] == largest
    others = [channel for channel in range(HIDDEN) if channel not in largest]
    assert torch.equal(after[others], before[others])
    weight, head = (policy.module[name].weight.detach().double() for name in ("body", "head"))
    x = policy.inputs(observations, calibration_noise(policy, 0, 0, 8)).double()
    for channel in sensitivity.remeasured:
        row = weight[channel.channel : channel.channel + 1]
        for column, bits in list(enumerate(CHANNEL_WIDTHS))[1:]:
            change = (x @ (round_rows(row, bits) - row).t()) * head[:, channel.channel]
            expected = float(change.square().sum()) / 8
            assert float(after[channel.channel, column]) == pytest.approx(expected, rel=1e-3)
        assert channel.linear == "body"
        assert channel.proxy == float(before[channel.channel, FOUR])
        assert channel.exact == float(after[channel.channel, FOUR])
    assert (after[:, 0] == before[:, 0]).all()


def test_costs_measured_on_few_observations_stand_for_all() -> None:
    """The eight on which channels are rounded have a gate of 1, the eight others one of 3."""
    policy, observations = GatedPolicy(actions=1), toy_observations(16)
    observations.state[:, 0] = [1, 3] * 8
    noises = noise_of_body(policy, observations)
    first_order, exact = (measure(policy, noises, observations, remeasured=n).costs["body"] for n in (0, HIDDEN))
    assert not torch.equal(first_order, exact) and torch.allclose(first_order, exact, rtol=1e-3)


def test_channels_without_gain_where_they_are_measured_keep_their_cost() -> None:
    policy, observations = GatedPolicy(actions=1), toy_observations(16)
    observations.state[:, 0] = [0, 1] * 8
    noises = noise_of_body(policy, observations)
    first_order = measure(policy, noises, observations)
    sensitivity = measure(policy, noises, observations, remeasured=HIDDEN)
    assert sensitivity.remeasured == () and torch.equal(sensitivity.costs["body"], first_order.costs["body"])
    assert first_order.costs["body"].count_nonzero()


def test_as_many_observations_as_asked_for() -> None:
    """Gradients in batches of 8; of a batch spread over them gradients, reference and four widths."""
    policy: Any = LinearPolicy(actions=1)
    observations = toy_observations(50)
    reported: list[tuple[str, float]] = []
    noises = unit_noises(policy, ["body"])
    measure_sensitivity(
        policy,
        noises,
        observations,
        AllocationSpec(4.0, directions=1, observations=20, remeasured=1),
        on_progress=lambda what, share: reported.append((what, share)),
    )
    assert policy.seen == [8, 8, 4, 8, *[8] * 5]
    shares = [share for _, share in reported]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1


def test_the_policy_stays_as_it_was(floating: PI05, observations: Observation) -> None:
    names = [linear for site in floating.sites()[-3:] for linear in site.linears]
    parameters = dict(floating.module.named_parameters())
    frozen = next(iter(parameters))
    trained = {name: parameter.requires_grad for name, parameter in parameters.items()}
    parameters[frozen].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in floating.module.state_dict().items()}
    measure(floating, unit_noises(floating, names), observations[:1], remeasured=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in floating.module.state_dict().items())
    found = {name: parameter.requires_grad for name, parameter in parameters.items()}
    assert found == trained | {frozen: False}
    assert all(parameter.grad is None for parameter in parameters.values())
    assert not any(module._forward_hooks for module in floating.module.modules())
    parameters[frozen].requires_grad_(trained[frozen])


def test_a_failure_leaves_the_policy_as_it_was() -> None:
    policy, observations = LinearPolicy(actions=1), toy_observations(2)
    before = policy.module["body"].weight.detach().clone()

    def fail(rows: Tensor, bits: int) -> Tensor:
        if bits == 2:
            raise RuntimeError("no such rounding")
        return round_rows(rows, bits)

    with pytest.raises(RuntimeError, match="no such rounding"):
        measure(policy, {"body": ChannelNoise(torch.ones(HIDDEN, 5), fail)}, observations, remeasured=1)
    assert torch.equal(policy.module["body"].weight, before)


def test_one_seed_one_result() -> None:
    policy, observations = LinearPolicy(actions=4), toy_observations(8)
    noises = noise_of_body(policy, observations)
    first, again = (measure(policy, noises, observations, remeasured=2).costs["body"] for _ in range(2))
    assert torch.equal(first, again)


def test_what_cannot_be_measured_is_an_error() -> None:
    policy = LinearPolicy(actions=1)
    with pytest.raises(CalibrationError, match="no calibration observations"):
        measure(policy, unit_noises(policy, ["body"]), toy_observations(0))
    with pytest.raises(CalibrationError, match="idle has no sensitivity: it never ran"):
        measure(policy, unit_noises(policy, ["body", "idle"]), toy_observations(2))
    with torch.no_grad():
        policy.module["head"].weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="gradient of the actions at body contains NaN"):
        measure(policy, unit_noises(policy, ["body"]), toy_observations(2))
    assert not policy.module["body"]._forward_hooks


def test_all_linears_share_one_budget() -> None:
    """Channels are weighed by their input width."""
    generator = torch.Generator().manual_seed(0)
    slopes = {
        name: torch.rand(out, 4, dtype=torch.float64, generator=generator) for name, out in (("a", 5), ("b", 3))
    }
    costs = {name: nn.functional.pad(slope.cumsum(1), (1, 0)) for name, slope in slopes.items()}
    widths = allocate_bits(Sensitivity(("a", "b"), costs, None, ()), {"a": 16, "b": 64}, 5.0)
    expected = allocate(torch.cat([costs["a"], costs["b"]]), torch.tensor([16] * 5 + [64] * 3), 5.0)
    assert widths["a"].dtype == torch.uint8
    assert torch.equal(torch.cat([widths["a"], widths["b"]]), expected)
    with pytest.raises(KeyError, match="b"):
        allocate_bits(Sensitivity(("a", "b"), costs, None, ()), {"a": 16}, 5.0)
