"""Law 4: what simulation computes and what integers compute is one function."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.kernels import native
from omega_qvla.numerics.quantizer import dequantize
from omega_qvla.pack.bits import unpack
from omega_qvla.pack.rows import rows_of, unpack_rows
from omega_qvla.pack.site import PackedLinear, PackedSite
from omega_qvla.quantization import quantize_policy
from omega_qvla.runtime import (
    DenoisingStep,
    QuantizedInput,
    QuantizedLinear,
    StepError,
    install,
    quantized_linears,
    unpacked_bytes,
)
from omega_qvla.runtime.input import site_transform
from omega_qvla.runtime.weight import Execution, Operand, Weight, compiled
from toy_policy import WIDTH, ToyPolicy, recipe, rules_for_both, toy_observations

ROTATED = {"smoothing": 0.5, "permutation": "zigzag", "rotation": "svd_hadamard", "block_size": 8}
GROUPED = {"granularity": "token_group", "group_size": 8}
ALLOCATION = {"average_bits": 5.0, "remeasured": 4}
PER_STEP = {"granularity": "channel", "mode": "per_step"}
TABLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "permuted": {"transform": {"permutation": "zigzag", "block_size": 8}},
    "rotated": {"transform": ROTATED},
    "folded": {"transform": ROTATED | {"folded_percentile": 99.0}},
    "grouped": {"transform": ROTATED, "weight": {"group_size": 8}, "activation": GROUPED},
    "grouped weights": {"weight": {"group_size": 8}},
    "grouped inputs": {"activation": GROUPED},
    "static tensor": {"activation": {"granularity": "tensor", "mode": "static"}},
    "three and eight bits": {"weight": {"bits": 3}, "activation": {"bits": 8}},
    "eight bits": {"weight": {"bits": 8}, "activation": {"bits": 8}},
    "static channel": {"activation": {"granularity": "channel", "mode": "static"}},
    "scaled only": {"transform": {"smoothing": 0.5}},
    "two rotations": {"transform": ROTATED | {"first_rotation": "svd", "permutation": "interleaved"}},
    "rotated outputs": {"transform": ROTATED | {"output_rotation": "svd"}},
    "full codes": {"weight": {"codes": "full"}, "activation": GROUPED | {"codes": "full"}},
    "weights only": {"transform": ROTATED, "activation": {"bits": 16}},
    "inputs only": {"weight": {"bits": 16}},
    "low rank": {"transform": ROTATED, "weight": {"rank": 2}},
    "weights searched": {"transform": {"smoothing": "search"}, "weight": {"scale_search": "output"}},
    "allocated": {"weight": {"allocation": ALLOCATION}, "activation": {"bits": 8}},
    "allocated, grouped": {"weight": {"allocation": ALLOCATION, "group_size": 8}, "activation": GROUPED},
    "allocated weights only": {"weight": {"allocation": ALLOCATION}, "activation": {"bits": 16}},
}


def sites_of(table: dict[str, Any]) -> dict[str, PackedSite]:
    result = quantize_policy(ToyPolicy(), rules_for_both(table), toy_observations(20))
    return {site.name: site for site in result.sites}


def per_step_site() -> PackedSite:
    rules = recipe({"part": "language", "keep": "-"}, {"part": "action", "quantize": {"activation": PER_STEP}})
    return quantize_policy(ToyPolicy(), rules, toy_observations(20)).sites[0]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With compiled kernels, and as where nothing was compiled."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: ())
    elif not native.available():
        pytest.skip("no kernels were compiled")
    return str(request.param)


def linears_of(site: PackedSite, execution: Execution, *, keep_unpacked: bool = True) -> list[QuantizedLinear]:
    return quantized_linears(site, DenoisingStep(4), execution, keep_unpacked=keep_unpacked)


def assert_same(a: Operand, b: Operand) -> None:
    assert a.values is b.values is None or torch.equal(a.values, b.values)
    assert a.codes is b.codes is None or torch.equal(a.codes, b.codes)
    assert a.scale is b.scale is None or torch.equal(a.scale, b.scale)


def whole_weight(packed: PackedLinear, site: PackedSite) -> Tensor:
    """What the stored tensors of a linear stand for, in the transformed coordinates, float64 [out, in]."""
    scale, stored = packed.scale.double(), packed.tensors
    if "widths" in stored:
        weight = torch.zeros(len(scale), site.in_features, dtype=torch.float64)
        for width, rows in unpack_rows(packed.packed, stored["widths"], site.in_features).items():
            which = rows_of(stored["widths"], width)
            weight[which] = dequantize(rows.double(), scale[which])
    else:
        weight = dequantize(unpack(packed.packed, site.spec.weight.bits), scale)
    return weight


def random_input(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", TABLES)
def test_integer_and_simulated_agree(name: str) -> None:
    site = sites_of(TABLES[name])["language.input"]
    x = random_input(2, 5)
    for a, b in zip(linears_of(site, "integer"), linears_of(site, "simulated"), strict=True):
        assert_same(a.source(x), b.source(x))
        assert torch.equal(a(x), b(x))
        assert a(x).shape == (2, 5, a.out_features)


@pytest.mark.parametrize("execution", ["integer", "simulated"])
@pytest.mark.parametrize("name", TABLES)
def test_unpacking_at_each_call_is_the_same_function(name: str, execution: Execution) -> None:
    site, x = sites_of(TABLES[name])["language.input"], random_input(2, 5)
    kept, packed = linears_of(site, execution), linears_of(site, execution, keep_unpacked=False)
    for a, b in zip(kept, packed, strict=True):
        assert_same(a.source(x), b.source(x))
        assert torch.equal(a(x), b(x)) and torch.equal(b(x), b(x.clone()))
        assert a.execution == b.execution and a.operand_bytes() > 0
        assert b.operand_bytes() == (a.operand_bytes() if compiled(a.execution) else 0)
    assert unpacked_bytes([site], execution) == unpacked(kept)


@pytest.mark.parametrize("name", TABLES)
def test_where_nothing_is_kept_unpacked_nothing_is_copied(name: str) -> None:
    site = sites_of(TABLES[name])["language.input"]
    parts = [(x.packed, x.scale, x.bias, *x.tensors.values()) for x in site.linears]
    stored = {id(tensor) for part in [site.tensors.values(), *parts] for tensor in part}
    for linear in linears_of(site, "simulated", keep_unpacked=False):
        linear(random_input(3))
        assert {id(held) for held in linear.buffers()} <= stored
        assert len(list(linear.buffers())) >= 3


@pytest.mark.parametrize("name", ["plain", "grouped", "full codes"])
def test_compiled_kernels_take_the_memory_of_what_is_stored(name: str, kernels: str) -> None:
    site = sites_of(TABLES[name])["language.input"]
    linears = linears_of(site, "integer")
    stored = sum(packed.packed.nbytes + packed.scale.nbytes for packed in site.linears)
    assert compiled("integer") == (kernels == "compiled") == all(linear.packed is None for linear in linears)
    if compiled("integer"):  # outputs come in whole tiles
        outputs = sum(linear.out_features for linear in linears)
        expected = stored / outputs * (-(-outputs // 16) * 16)
        assert abs(sum(linear.operand_bytes() for linear in linears) - expected) < len(linears)


def unpacked(linears: list[QuantizedLinear]) -> int:
    """Memory besides what is stored."""
    return sum(linear.operand_bytes() for linear in linears if not compiled(linear.execution))


def test_unpacked_bytes_of_several_sites() -> None:
    sites = [*sites_of(TABLES["grouped"]).values(), per_step_site()]
    for execution in ("integer", "simulated"):
        total = unpacked([linear for site in sites for linear in linears_of(site, execution)])
        assert unpacked_bytes(sites, execution) == total
    assert unpacked_bytes([], "integer") == 0


@pytest.mark.parametrize("execution", ["integer", "simulated"])
@pytest.mark.parametrize("name", TABLES)
def test_against_dequantized_tensors_in_float64(name: str, execution: Execution) -> None:
    site = sites_of(TABLES[name])["language.input"]
    x = random_input(7)
    for linear, packed in zip(linears_of(site, execution), site.linears, strict=True):
        operand, stored = linear.source(x), packed.tensors
        inputs = transformed = linear.source.transform(x).double()
        if operand.codes is not None and operand.scale is not None:
            inputs = dequantize(operand.codes, operand.scale.double())
        weight = whole_weight(packed, site)
        assert packed.bias is not None
        exact, magnitude = inputs @ weight.t(), inputs.abs() @ weight.abs().t()
        if "low_rank_up" in stored:
            up, down = stored["low_rank_up"].double(), stored["low_rank_down"].double()
            exact = exact + transformed @ down.t() @ up.t()
            magnitude = magnitude + transformed.abs() @ down.abs().t() @ up.abs().t()
        if "output_rotation" in stored:
            back = torch.block_diag(*stored["output_rotation"].double())
            exact, magnitude = exact @ back, magnitude @ back.abs()
        error = (linear(x).double() - exact - packed.bias.double()).abs()
        magnitude = magnitude + packed.bias.double().abs()
        assert (error <= 3 * WIDTH * torch.finfo(torch.float32).eps * magnitude).all()


@pytest.mark.parametrize("name", TABLES)
def test_codes_are_the_transformed_input_rounded(name: str) -> None:
    site = sites_of(TABLES[name])["language.input"]
    x = random_input(7)
    source = QuantizedInput(site, DenoisingStep(4))
    operand, transformed = source(x), site_transform(site).apply(x.double())
    assert (source.transform(x) - transformed).abs().max() < 1e-5 * transformed.abs().max()
    codes, scale = operand.codes, operand.scale
    if not site.spec.activation.rounds:
        assert codes is None and scale is None
        return
    assert codes is not None and scale is not None
    limit = 2 ** (site.spec.activation.bits - 1) - 1
    assert codes.dtype == torch.int8 and codes.max() <= limit
    assert codes.min() >= (-limit if site.spec.activation.codes == "symmetric" else -limit - 1)
    error = (dequantize(codes, scale.double()) - transformed).abs()
    steps = scale.double().repeat_interleave(WIDTH // scale.shape[1], 1).expand_as(error)
    clipped = (transformed > steps * limit) | (transformed < steps * codes.min())
    assert (error[~clipped] <= steps[~clipped] * 0.5001).all()


def test_the_product_is_nearly_that_of_the_original_weight() -> None:
    policy, x = ToyPolicy(), random_input(50)
    eight = {"weight": {"bits": 8}, "activation": {"bits": 8}, "transform": TABLES["folded"]["transform"]}
    site = sites_of(eight)["language.input"]
    for linear in linears_of(site, "integer"):
        expected = policy.module.get_submodule(linear.name)(x)
        assert (linear(x) - expected).norm() < 0.03 * expected.norm()


def test_the_input_is_quantized_once_for_all_linears_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    operand = QuantizedInput._operand

    def counted(self: QuantizedInput, x: Tensor, row: int) -> Operand:
        calls.append(x)
        return operand(self, x, row)

    monkeypatch.setattr(QuantizedInput, "_operand", counted)
    linears, x = linears_of(sites_of(TABLES["rotated"])["language.input"], "integer"), random_input(3)
    for linear in linears:
        linear(x)
    assert len(linears) == 2 and len(calls) == 1
    linears[0](x.clone())
    assert len(calls) == 2


@pytest.mark.parametrize("execution", ["integer", "simulated"])
def test_a_product_that_the_model_changed_is_made_again(execution: Execution) -> None:
    linears, x = linears_of(sites_of({})["language.input"], execution), random_input(3)
    first = [linear(x).clone() for linear in linears]
    for linear in linears:
        linear(x).zero_()
    assert all(torch.equal(linear(x), before) for linear, before in zip(linears, first, strict=True))


@pytest.mark.parametrize("execution", ["integer", "simulated"])
def test_what_is_asked_for_again_in_another_step_is_multiplied_once(execution: Execution) -> None:
    """The keys and values of a context are the same in every denoising step."""
    products = 0

    class Counting:
        nbytes = 0

        def __init__(self, weight: Weight) -> None:
            self.weight = weight

        def product(self, operand: Operand) -> Tensor:
            nonlocal products
            products += 1
            return self.weight.product(operand)

    sites, x = sites_of({}), random_input(3)
    for name, expected in ("action.input", 2), ("language.input", 4):
        (linear, *_), products = linears_of(sites[name], execution), 0
        linear._weight = Counting(linear._weight)
        first = linear(x).clone()
        linear(x).zero_()  # an answer from memory is the model's own
        assert torch.equal(linear(x), first) and products == (1 if name == "action.input" else 3)
        x.mul_(1)
        assert torch.equal(linear(x), first) and products == expected


@pytest.mark.parametrize("execution", ["integer", "simulated"])
def test_an_input_that_was_modified_is_quantized_again(execution: Execution) -> None:
    linear, x = linears_of(sites_of({})["language.input"], execution)[0], random_input(3)
    before = linear(x)
    x *= -2
    assert torch.equal(linear(x), linear(x.clone()))
    assert not torch.equal(linear(x), before)


def test_a_tensor_at_the_address_of_a_dead_one_is_quantized_again() -> None:
    linear = linears_of(sites_of({})["language.input"], "integer")[0]
    for seed in range(20):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(linear(x), linear(x.clone()))
        del x


def test_nothing_is_kept_of_a_dead_input() -> None:
    source = linears_of(sites_of({})["language.input"], "integer")[0].source
    first, second = random_input(3), random_input(4)
    source(first)
    operand = weakref.ref(source(second))
    del first
    assert source(second) is operand()
    del second
    assert operand() is None


def test_inference_mode() -> None:
    linear, x = linears_of(sites_of({})["language.input"], "integer")[0], random_input(3)
    with torch.inference_mode():
        assert torch.equal(linear(x * 1), linear(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["plain", "rotated", "grouped", "static tensor", "static channel"])
def test_an_input_that_is_not_finite(name: str, bad: float) -> None:
    linear, x = linears_of(sites_of(TABLES[name])["language.input"], "integer")[0], random_input(3)
    x[1, 2] = bad
    with pytest.raises(ValueError, match=r"the input of language\.input contains NaN or infinity"):
        linear(x)


def test_a_scale_per_step_is_that_of_the_running_step() -> None:
    site, step, x = per_step_site(), DenoisingStep(4), random_input(3)
    source = QuantizedInput(site, step)
    for index in range(4):
        with step.at(index):
            scale = source(x).scale
            assert scale is not None and torch.equal(scale, site.tensors["step_scale"][index : index + 1])


def test_a_scale_per_step_needs_a_step() -> None:
    step, x = DenoisingStep(4), random_input(3)
    source = QuantizedInput(per_step_site(), step)
    with step.at(0):
        source(x)
    for tensor in (x, x.clone()):
        with pytest.raises(StepError, match="no denoising step is running"):
            source(tensor)


def test_scales_per_channel_are_simulated_whatever_is_asked_for() -> None:
    assert [linear.execution for linear in linears_of(per_step_site(), "integer")] == ["simulated"]
    assert {linear.execution for linear in linears_of(sites_of({})["language.input"], "integer")} == {"integer"}


def test_it_answers_for_the_weight_without_holding_one() -> None:
    for execution in ("integer", "simulated"):
        linear = linears_of(sites_of({})["language.input"], execution)[0]
        assert linear.weight.shape == (WIDTH, WIDTH) and linear.weight.dtype == torch.float32
        assert linear.weight.device.type == "meta"
        held = [*linear.parameters(), *linear.buffers()]
        assert not [x for x in held if x.is_floating_point() and x.shape == linear.weight.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_have_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    linear = linears_of(sites_of({})["language.input"], "integer")[0]
    assert linear(random_input(3).to(dtype)).dtype == dtype


def test_without_a_bias() -> None:
    site = sites_of({})["language.input"]
    bare = replace(site, linears=tuple(replace(linear, bias=None) for linear in site.linears))
    x = random_input(3)
    for with_bias, without in zip(linears_of(site, "integer"), linears_of(bare, "integer"), strict=True):
        assert torch.equal(without(x) + with_bias.bias, with_bias(x))


@pytest.mark.parametrize("keep_unpacked", [True, False])
def test_install_replaces_the_linears_by_name(keep_unpacked: bool) -> None:
    policy = ToyPolicy()
    sites = list(sites_of({}).values())
    install(policy.module, sites, policy.step, "integer", keep_unpacked=keep_unpacked)
    replaced = [name for name, m in policy.module.named_modules() if isinstance(m, QuantizedLinear)]
    assert replaced == ["language.q", "language.k", "action.up", "action.down"]
    linears = [m for m in policy.module.modules() if isinstance(m, QuantizedLinear)]
    assert unpacked(linears) == (unpacked_bytes(sites, "integer") if keep_unpacked else 0)
    assert isinstance(policy.module.head, nn.Linear)
    noise = torch.zeros(2, *policy.noise_shape)
    assert policy.infer(toy_observations(2), noise).shape == (2, 3, 2)


def test_install_into_another_model() -> None:
    with pytest.raises(AttributeError):
        install(nn.Sequential(nn.Linear(2, 2)), list(sites_of({}).values()), DenoisingStep(4), "integer")
