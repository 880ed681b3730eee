"""What is learned for a block, against the formulas on the deployed codes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.calibration import CalibrationError
from omega_qvla.calibration.replay import BlockCall, record_block
from omega_qvla.pack.manifest import PlannedSite
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import Observation
from omega_qvla.quantization.reconstruction import Learned, check_learnable, reconstruct
from omega_qvla.spec import ActivationSpec, AllocationSpec, LinearSpec, RecipeError, TransformSpec, WeightSpec

WIDTH, HIDDEN = 16, 32
QUICK: dict[str, Any] = {"iterations": 75, "learning_rate": 0.02}
SITES = [
    PlannedSite("block.input", "language", "block", WIDTH, ("block.gate", "block.up"), 0),
    PlannedSite("block.hidden", "language", "block", HIDDEN, ("block.down",), 0),
]
BOTH = LinearSpec(TransformSpec(smoothing="learned"), WeightSpec(scale_search="learned"), ActivationSpec(bits=16))
TOKENS = LinearSpec(TransformSpec(smoothing="learned"), WeightSpec(scale_search="learned"), ActivationSpec())
GROUPS = LinearSpec(
    TransformSpec(smoothing="learned"),
    WeightSpec(bits=3, group_size=8, scale_search="learned", codes="full"),
    ActivationSpec(bits=5, granularity="token_group", group_size=8, codes="full"),
)
SMOOTHING = LinearSpec(TransformSpec(smoothing="learned"), WeightSpec(), ActivationSpec())
CLIPPING = LinearSpec(TransformSpec(), WeightSpec(scale_search="learned"), ActivationSpec(bits=16))
ROUNDED_INPUTS = LinearSpec(TransformSpec(smoothing="learned"), WeightSpec(bits=16), ActivationSpec(bits=4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.gate(x).relu() * self.up(x))


def policy_of(block: nn.Module) -> Any:
    return SimpleNamespace(module=nn.ModuleDict({"block": block}))


def block_and_inputs() -> tuple[Block, list[Tensor]]:
    torch.manual_seed(0)
    block = Block()
    return block, [torch.randn(2, 6, WIDTH) for _ in range(4)]


def calls_of(block: nn.Module, inputs: list[Tensor]) -> list[BlockCall]:
    with torch.no_grad():
        return [BlockCall((x,), {}, block(x), None) for x in inputs]


def learn(block: nn.Module, inputs: list[Tensor], spec: LinearSpec, **options: Any) -> Learned:
    specs = {site.name: spec for site in SITES}
    return reconstruct(policy_of(block), SITES, specs, calls_of(block, inputs), **(QUICK | options))


def rounded(x: Tensor, scale: Tensor, bits: int, codes: str) -> Tensor:
    """x [..., in] on the grid of scales [..., groups]."""
    top = 2 ** (bits - 1) - 1
    step = scale.repeat_interleave(x.shape[-1] // scale.shape[-1], -1)
    return (x / step).nan_to_num().round().clamp(-top - (codes == "full"), top) * step


def peak(x: Tensor, group_size: int | None) -> Tensor:
    return x.unflatten(-1, (-1, group_size or x.shape[-1])).abs().amax(-1)


def deployed(block: Block, spec: LinearSpec, learned: Learned, x: Tensor) -> Tensor:
    """The block in float64 on the codes and scales that a checkpoint would hold."""

    def linear(site: PlannedSite, name: str, x: Tensor) -> Tensor:
        module = block.get_submodule(name)
        weight = module.weight.double()
        if site.name in learned.smoothing:
            factor = learned.smoothing[site.name].double()
            x, weight = x / factor, weight * factor
        bits, group = spec.weight.bits, spec.weight.group_size
        if bits != 16:
            share = learned.clipping.get(f"block.{name}", torch.ones(()))
            scale = share.double() * peak(weight, group) / (2 ** (bits - 1) - 1)
            weight = rounded(weight, scale.bfloat16().double(), bits, spec.weight.codes)
        bits, group = spec.activation.bits, spec.activation.group_size
        if bits != 16:
            x = rounded(x, peak(x, group) / (2 ** (bits - 1) - 1), bits, spec.activation.codes)
        return x @ weight.t() + (0 if module.bias is None else module.bias.double())

    gate, up = linear(SITES[0], "gate", x), linear(SITES[0], "up", x)
    return x + linear(SITES[1], "down", gate.relu() * up)


@torch.no_grad()
def deployed_error(block: Block, spec: LinearSpec, learned: Learned, inputs: list[Tensor]) -> float:
    errors = [(deployed(block, spec, learned, x.double()) - block(x)).square().mean() for x in inputs]
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("spec", [BOTH, TOKENS, GROUPS, SMOOTHING, CLIPPING, ROUNDED_INPUTS])
def test_errors_are_those_of_the_deployed_block(spec: LinearSpec) -> None:
    block, inputs = block_and_inputs()
    learned = learn(block, inputs, spec)
    nothing = Learned({}, {}, 0.0, 0.0)
    assert learned.start == pytest.approx(deployed_error(block, spec, nothing, inputs), rel=1e-4)
    assert learned.end == pytest.approx(deployed_error(block, spec, learned, inputs), rel=1e-4)
    assert learned.end < learned.start


@pytest.mark.parametrize(("spec", "groups"), [(BOTH, {16: 1, 32: 1}), (GROUPS, {16: 2, 32: 4})])
def test_everything_is_learned(spec: LinearSpec, groups: dict[int, int]) -> None:
    """Every factor and every clipping has moved from where it began."""
    block, inputs = block_and_inputs()
    learned = learn(block, inputs, spec)
    assert {name: tuple(s.shape) for name, s in learned.smoothing.items()} == {
        "block.input": (WIDTH,),
        "block.hidden": (HIDDEN,),
    }
    assert {name: tuple(share.shape) for name, share in learned.clipping.items()} == {
        "block.gate": (HIDDEN, groups[WIDTH]),
        "block.up": (HIDDEN, groups[WIDTH]),
        "block.down": (WIDTH, groups[HIDDEN]),
    }
    for factor in learned.smoothing.values():
        assert factor.dtype == torch.float32 and not factor.requires_grad
        assert (factor > 0).all() and (factor != 1).all()
    for share in learned.clipping.values():
        assert share.dtype == torch.float32 and not share.requires_grad
        assert (share > 0).all() and (share < 1).all()
        assert (share != torch.tensor(4.0).sigmoid()).all()


def test_only_what_the_spec_asks_for_is_learned() -> None:
    block, inputs = block_and_inputs()
    assert not learn(block, inputs, SMOOTHING, iterations=1).clipping
    assert not learn(block, inputs, CLIPPING, iterations=1).smoothing


def test_a_site_that_learns_nothing_stays_in_floating_point() -> None:
    block, inputs = block_and_inputs()
    specs = {"block.input": LinearSpec(), "block.hidden": CLIPPING}
    alone = reconstruct(policy_of(block), SITES, specs, calls_of(block, inputs), iterations=1)
    fewer = reconstruct(policy_of(block), SITES[1:], specs, calls_of(block, inputs), iterations=1)
    assert set(alone.clipping) == {"block.down"}
    assert alone.start == fewer.start < learn(block, inputs, CLIPPING, iterations=1).start


def test_a_planted_outlier_channel() -> None:
    """One channel takes all the codes of a token until its factor has grown."""
    block, inputs = block_and_inputs()
    inputs = [x * torch.ones(WIDTH).index_fill(0, torch.tensor([3]), 30.0) for x in inputs]
    with torch.no_grad():
        block.gate.weight[:, 3] /= 30
        block.up.weight[:, 3] /= 30
    learned = learn(block, inputs, SMOOTHING)
    assert learned.end < learned.start / 2
    assert learned.smoothing["block.input"].argmax() == 3


def test_planted_outlier_weights() -> None:
    """A large weight on a channel that hardly carries anything is worth clipping."""
    block, inputs = block_and_inputs()
    inputs = [x * torch.ones(WIDTH).index_fill(0, torch.tensor([3]), 1e-3) for x in inputs]
    with torch.no_grad():
        block.gate.weight[:, 3] = block.up.weight[:, 3] = 1.0
    learned = learn(block, inputs, CLIPPING, learning_rate=0.1)
    assert learned.end < learned.start / 2
    for name in ("block.gate", "block.up"):
        assert learned.clipping[name].median() < 0.5


def test_a_rate_at_which_everything_gets_worse_ends_with_round_to_nearest() -> None:
    block, inputs = block_and_inputs()
    learned = learn(block, inputs, BOTH, iterations=30, learning_rate=1.0)
    assert learned.end == learned.start
    assert all((share == 1).all() for share in [*learned.smoothing.values(), *learned.clipping.values()])


def test_weights_on_the_grid_have_nothing_to_learn() -> None:
    block, inputs = block_and_inputs()
    with torch.no_grad():
        for linear in (block.gate, block.up, block.down):
            linear.weight.copy_(torch.randint(-7, 8, linear.weight.shape) / 8)
            linear.weight[:, 0] = 7 / 8
    learned = learn(block, inputs, BOTH)
    assert learned.end == learned.start == 0


def test_the_unit_of_the_output_does_not_matter() -> None:
    class Small(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2.0**-20

    block, inputs = block_and_inputs()
    small = Small()
    small.load_state_dict(block.state_dict())
    expected, found = learn(block, inputs, TOKENS, iterations=25), learn(small, inputs, TOKENS, iterations=25)
    assert found.end == expected.end * 2.0**-40 < found.start
    assert all(torch.equal(found.clipping[name], share) for name, share in expected.clipping.items())


def test_the_seed_decides() -> None:
    block, inputs = block_and_inputs()
    once, again, other = (learn(block, inputs, TOKENS, iterations=25, seed=seed) for seed in (1, 1, 2))
    assert once.end == again.end and once.end != other.end
    assert all(torch.equal(once.smoothing[name], again.smoothing[name]) for name in once.smoothing)


@pytest.mark.parametrize("stack", ["paligemma.model.language_model", "gemma_expert.model"])
@pytest.mark.parametrize("spec", [BOTH, TOKENS])
def test_blocks_of_pi05(floating: PI05, observations: Observation, stack: str, spec: LinearSpec) -> None:
    """The error falls, and the policy is as before."""
    block = f"model.paligemma_with_expert.{stack}.layers.1"
    before = {name: tensor.clone() for name, tensor in floating.module.state_dict().items()}
    calls = record_block(floating, block, observations, noise_seed=0)
    sites = [
        PlannedSite(s.name, s.part, s.block, floating.module.get_submodule(s.linears[0]).in_features, s.linears, 0)
        for s in floating.sites()
        if s.block == block
    ]
    learned = reconstruct(floating, sites, {site.name: spec for site in sites}, calls, iterations=25)
    assert learned.end < learned.start
    assert set(learned.clipping) == {name for site in sites for name in site.linears}
    after = floating.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in floating.module.parameters())
    assert not any(module._forward_pre_hooks for module in floating.module.modules())


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "transform.smoothing = 0.5": {"transform": TransformSpec(smoothing=0.5)},
    "transform.permutation = 'zigzag'": {"transform": TransformSpec(permutation="zigzag")},
    "transform.rotation = 'hadamard'": {"transform": TransformSpec(rotation="hadamard")},
    "transform.first_rotation = 'svd'": {"transform": TransformSpec(first_rotation="svd")},
    "transform.output_rotation = 'svd'": {"transform": TransformSpec(output_rotation="svd")},
    "transform.folded_percentile = 99.0": {"transform": TransformSpec(folded_percentile=99.0)},
    "weight.rank = 4": {"weight": WeightSpec(scale_search="learned", rank=4)},
    "weight.scale_search = 'mse'": {"weight": WeightSpec(scale_search="mse")},
    "weight.rounding = 'gptq'": {"weight": WeightSpec(rounding="gptq")},
    "weight.allocation": {"weight": WeightSpec(allocation=AllocationSpec(4.0))},
    "activation.mode = 'static'": {"activation": ActivationSpec(granularity="tensor", mode="static")},
    "weight.scale_search = 'learned'": {"weight": WeightSpec(bits=16, scale_search="learned")},
}


@pytest.mark.parametrize("said", UNSUPPORTED)
def test_what_cannot_be_learned_is_named(said: str) -> None:
    pieces = {"transform": TransformSpec(smoothing="learned"), "weight": WeightSpec(scale_search="learned")}
    block, inputs = block_and_inputs()
    with pytest.raises(RecipeError) as error:
        learn(block, inputs, LinearSpec(**(pieces | UNSUPPORTED[said])))
    assert str(error.value).startswith(f"block.input: {said}")


def test_specs_without_anything_to_learn_pass_the_check() -> None:
    check_learnable("site", LinearSpec(TransformSpec(rotation="svd"), WeightSpec(rounding="gptq")))


def test_an_error_that_is_not_finite() -> None:
    block, inputs = block_and_inputs()
    inputs[2][0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"the error of block is nan"):
        learn(block, inputs, BOTH)
    assert not any(module._forward_pre_hooks for module in block.modules())
