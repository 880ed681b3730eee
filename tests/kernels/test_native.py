"""The compiled kernels against 64-bit integers and float64, bit for bit where the definition fixes every bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from omega_qvla.kernels import native
from omega_qvla.kernels.grouped_matmul import GroupedWeight
from omega_qvla.kernels.native import NativeInput, NativeWeight, RoundedInput, library
from omega_qvla.numerics.quantizer import peak_scale, quantize
from omega_qvla.numerics.rotation import apply_blocks, hadamard, hadamard_transform

pytestmark = pytest.mark.skipif(not native.available(), reason="no kernels were compiled")

BLOCK = 16


@pytest.fixture(params=native.available())
def kernels(request: pytest.FixtureRequest) -> str:
    """Each kind that this processor runs."""
    return str(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """However little there is to do."""
    monkeypatch.setattr(library, "FEW_VALUES", 0)
    monkeypatch.setattr(library, "FEW_PRODUCTS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    """Every other row has only extreme codes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator).to(torch.int8)
    codes[::2] = torch.where(codes[::2] < 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
    return codes


def padded(codes: Tensor, groups: int, width: int) -> Tensor:
    """[tokens, in] as [groups, tokens, width]."""
    found = torch.zeros(groups, len(codes), width, dtype=torch.int8)
    found[..., : codes.shape[1] // groups] = codes.unflatten(1, (groups, -1)).transpose(0, 1)
    return found


# tokens, groups, channels of a group, outputs
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 64, 16),
    (2, 3, 5, 17),
    (5, 2, 64, 33),
    (7, 3, 128, 15),
    (12, 1, 100, 40),
    (13, 16, 64, 96),
    (50, 4, 64, 128),
    (61, 1, 2050, 31),
]
WIDTHS = [(4, 4), (4, 8), (8, 4), (8, 8), (2, 4), (3, 8), (8, 5)]
"""Bits of weights and of inputs."""


@pytest.mark.parametrize(("bits", "input_bits"), WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_64_bit_integers(
    shape: tuple[int, int, int, int], bits: int, input_bits: int, kernels: str, threads: int
) -> None:
    tokens, groups, size, out = shape
    weight, x = (
        random_codes(out, groups * size, bits=bits),
        random_codes(tokens, groups * size, bits=input_bits, seed=1),
    )
    for scales in {1, groups}:
        scale = torch.rand(out, scales).bfloat16()
        for rows, columns in {(tokens, groups), (tokens, 1), (1, 1)}:
            input_scale = torch.rand(rows, columns)
            expected = GroupedWeight(weight, scale, groups, "reference", bits).matmul(x, input_scale)
            found = NativeWeight(weight, scale, groups, bits, input_bits=input_bits, kernels=kernels)
            codes = padded(x, groups, found.width)
            assert torch.equal(found.matmul(codes, input_scale, codes.sum(-1, dtype=torch.int32)), expected)


@pytest.mark.parametrize("seed", range(40))
def test_random_sizes(seed: int, kernels: str) -> None:
    draw = random.Random(seed)
    tokens, groups, size = draw.randint(0, 70), draw.randint(1, 9), draw.choice([draw.randint(1, 200), 64, 128])
    out, (bits, input_bits) = draw.randint(1, 150), draw.choice(WIDTHS)
    weight = random_codes(out, groups * size, bits=bits, seed=seed)
    scale, x = torch.rand(out, groups).bfloat16(), random_input(tokens, groups * size)
    limit = 2 ** (input_bits - 1) - 1
    given = {"group_size": size, "lowest": -limit - 1, "highest": limit}
    rounded = NativeInput("site", groups * size, kernels=kernels, **given).round(x)
    codes = quantize(x, peak_scale(x, input_bits, size), input_bits, "full") if tokens else x.to(torch.int8)
    assert torch.equal(rounded.flat, codes)
    found = NativeWeight(weight, scale, groups, bits, input_bits=input_bits, kernels=kernels)
    expected = GroupedWeight(weight, scale, groups, "reference", bits).matmul(codes, rounded.scale)
    assert torch.equal(found.matmul(rounded.codes, rounded.scale, rounded.sums), expected)


@pytest.mark.parametrize("size", [64, 252, 256, 260, 512, 516])
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_at_their_bounds(size: int, bits: int, kernels: str) -> None:
    """All codes of a lane at one end: sums in 16 bits are as large as they get."""
    ends = [
        torch.tensor(pair).repeat_interleave(2).repeat(size // 4).to(torch.int8)
        for low, high in [(-8, 7), (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)]
        for pair in [(low, low), (low, high), (high, low), (high, high)]
    ]
    x, weight = torch.stack(ends[:4]), torch.stack(ends[4:])
    scale = torch.ones(len(weight), 1).bfloat16()
    found = NativeWeight(weight, scale, 1, bits, input_bits=4, kernels=kernels)
    codes = padded(x, 1, found.width)
    product = found.matmul(codes, torch.ones(1, 1), codes.sum(-1, dtype=torch.int32))
    assert torch.equal(product, (x.long() @ weight.long().t()).float())


def test_every_processor_gives_the_same_product() -> None:
    weight, scale, x = random_codes(40, 256, bits=4), torch.rand(40, 4).bfloat16(), random_codes(9, 256, bits=4)
    codes = padded(x, 4, 64)
    products = [
        NativeWeight(weight, scale, 4, 4, input_bits=4, kernels=name).matmul(
            codes, torch.ones(9, 4), codes.sum(-1, dtype=torch.int32)
        )
        for name in native.available()
    ]
    assert all(torch.equal(product, products[0]) for product in products)


@pytest.mark.parametrize("tokens", [0, 1, 6, 25])
def test_a_token_does_not_depend_on_those_beside_it(tokens: int, kernels: str, threads: int) -> None:
    found = rotating(kernels)
    weight = NativeWeight(random_codes(24, 64, bits=4), torch.rand(24, 4).bfloat16(), 4, 4, input_bits=4)
    x = random_input(tokens)
    together = found.round(x, values=True)
    product = weight.matmul(together.codes, together.scale, together.sums)
    assert product.shape == (tokens, 24)
    for i in range(tokens):
        alone = found.round(x[i : i + 1], values=True)
        assert torch.equal(alone.codes, together.codes[:, i : i + 1])
        assert torch.equal(alone.sums, together.sums[:, i : i + 1])
        assert torch.equal(alone.scale, together.scale[i : i + 1])
        assert torch.equal(alone.values, together.values[i : i + 1])
        assert torch.equal(weight.matmul(alone.codes, alone.scale, alone.sums), product[i : i + 1])


FIELDS = ("codes", "sums", "scale", "values")


def assert_same(a: RoundedInput, b: RoundedInput) -> None:
    for key in FIELDS:
        assert torch.equal(getattr(a, key), getattr(b, key))


def random_input(tokens: int, channels: int = 64) -> Tensor:
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(3))


def rotating(kernels: str) -> NativeInput:
    return NativeInput(
        "site", 64, rotation=rotations("matrices"), block_size=BLOCK, group_size=BLOCK, kernels=kernels
    )


Kind = Literal["none", "hadamard", "matrices", "short matrices"]


def rotations(kind: Kind, channels: int = 64, size: int = BLOCK) -> Any:
    generator = torch.Generator().manual_seed(5)
    matrices = torch.linalg.qr(torch.randn(channels // size, size, size, generator=generator)).Q.contiguous()
    found: dict[Kind, Any] = {
        "none": None,
        "hadamard": "hadamard",
        "matrices": matrices,
        "short matrices": matrices.bfloat16(),
    }
    return found[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("size", [1, 2, 8, 64])
@pytest.mark.parametrize("kind", ["none", "hadamard", "matrices", "short matrices"])
def test_the_transform_is_that_of_float64(
    kind: Kind, size: int, factors: bool, dtype: torch.dtype, kernels: str, threads: int
) -> None:
    before, after, order, x = torch.rand(64) + 0.5, torch.rand(64) + 0.5, torch.randperm(64).int(), random_input(9)
    x, rotation = x.to(dtype), rotations(kind, size=size)
    matrices = hadamard(size).expand(64 // size, -1, -1) if kind == "hadamard" else rotation
    expected = x.double()
    if factors:
        expected = (expected * before.double())[:, order.long()]
    if matrices is not None:
        expected = apply_blocks(expected, matrices.double())
    if factors:
        expected = expected * after.double()
    given = {"before": before, "order": order, "after": after} if factors else {}
    found = NativeInput("site", 64, rotation=rotation, block_size=size, kernels=kernels, **given)
    assert (found.transform(x).double() - expected).abs().max() < 4e-6 * expected.abs().max()
    assert torch.equal(found.transform(x), found.round(x, values=True).values)


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 64])
def test_a_hadamard_rotation_has_torchs_bits(size: int, kernels: str, threads: int) -> None:
    x = torch.randn(9, 192)
    found = NativeInput("site", 192, rotation="hadamard", block_size=size, kernels=kernels)
    assert torch.equal(found.transform(x), hadamard_transform(x, size))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("group", "flushed"), [(64, 64), (64, 16), (16, 16), (6, 3), (1, 1), (48, 8)])
def test_codes_are_what_the_transform_rounds_to(
    group: int, flushed: int, bits: int, kernels: str, threads: int
) -> None:
    channels = 192
    found = NativeInput(
        "site",
        channels,
        rotation="hadamard",
        block_size=BLOCK,
        group_size=group,
        flushed=flushed,
        lowest=-(2 ** (bits - 1)) + 1,
        highest=2 ** (bits - 1) - 1,
        kernels=kernels,
    )
    x = random_input(11, channels)
    x[4] = 0
    rounded = found.round(x, values=True)
    assert rounded.values is not None
    scale = peak_scale(rounded.values, bits, group)
    assert torch.equal(rounded.scale, scale)
    expected = padded(quantize(rounded.values, scale, bits), channels // flushed, found.width)
    assert torch.equal(rounded.codes, expected)
    assert torch.equal(rounded.sums, expected.sum(-1, dtype=torch.int32))


def test_codes_of_a_fixed_scale(kernels: str, threads: int) -> None:
    x, scale = random_input(11), torch.tensor([[0.2]])
    found = NativeInput("site", 64, flushed=16, lowest=-8, kernels=kernels).round(x, scale)
    assert torch.equal(found.flat, quantize(x, scale, 4, "full")) and torch.equal(found.scale, scale)
    assert found.codes.min() == -8 and found.codes.max() == 7 and found.values is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 31, 63])
def test_an_input_that_is_not_finite(bad: float, place: int, kernels: str, threads: int) -> None:
    x = random_input(20)
    x[13, place] = bad
    for found in (rotating(kernels), NativeInput("site", 64, group_size=1, kernels=kernels)):
        for call in (found.round, found.transform):
            with pytest.raises(ValueError, match="the input of site contains NaN or infinity"):
                call(x)


def test_tensors_that_are_not_contiguous(kernels: str) -> None:
    found, x = rotating(kernels), random_input(64)
    assert_same(found.round(x.t().contiguous().t(), values=True), found.round(x, values=True))
    assert_same(
        found.round(random_input(20)[::3], values=True), found.round(random_input(20)[::3].clone(), values=True)
    )
    misaligned = torch.cat([torch.zeros(1), random_input(5).flatten()])[1:].view(5, 64)
    assert_same(found.round(misaligned, values=True), found.round(random_input(5), values=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group_size": 5}, "64 channels do not come in groups of 5"),
        ({"flushed": 7}, "flushed after 7"),
        ({"lowest": -200}, "codes from -200 to 7"),
        ({"highest": 0}, "codes from -7 to 0"),
        ({"rotation": "hadamard", "block_size": 5}, "blocks of 5 channels do not divide"),
        ({"rotation": torch.ones(2, 16, 16), "block_size": 16}, r"rotation is torch\.float32 \[2, 16, 16\]"),
        ({"rotation": torch.ones(4, 16, 16).double(), "block_size": 16}, r"rotation is torch\.float64"),
        ({"before": torch.ones(63)}, r"before is torch\.float32 \[63\]"),
        ({"after": torch.ones(64).half()}, r"after is torch\.float16"),
        ({"order": torch.zeros(64, dtype=torch.int32)}, "order is no permutation"),
        ({"order": torch.arange(64)}, r"order is torch\.int64"),
        ({"kernels": "avx9"}, "no kernels called 'avx9'; it runs .*portable"),
    ],
)
def test_an_input_that_does_not_fit_itself(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NativeInput("site", 64, **given)


def test_a_hadamard_matrix_has_a_power_of_two_of_rows() -> None:
    with pytest.raises(ValueError, match="a power of two of rows, not 12"):
        NativeInput("site", 48, rotation="hadamard", block_size=12)


@pytest.mark.parametrize(
    "x", [torch.ones(3, 63), torch.ones(2, 3, 63), torch.ones(3, 64).double(), torch.tensor(1.0)]
)
def test_tokens_of_another_kind(x: Tensor) -> None:
    for call in (NativeInput("site", 64).round, NativeInput("site", 64).transform):
        with pytest.raises(ValueError, match="the input is "):
            call(x)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6), (1, 2, 3), (0, 3), ()])
def test_products_have_the_shape_of_their_tokens(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(*shape, 64), NativeWeight(torch.ones(40, 64, dtype=torch.int8), torch.ones(40, 1), 1, 4)
    source = NativeInput("site", 64)
    rows = weight.product(source.round(x.reshape(-1, 64)))
    assert torch.equal(weight.product(source.round(x)), rows.view(*shape, 40))
    assert torch.equal(source.round(x).flat, source.round(x.reshape(-1, 64)).flat)


@pytest.mark.parametrize("scale", [torch.ones(1), torch.ones(1, 64), torch.ones(1, 1).double()])
def test_a_fixed_scale_of_another_kind(scale: Tensor) -> None:
    with pytest.raises(ValueError, match="the fixed scale is"):
        NativeInput("site", 64).round(random_input(2), scale)


@pytest.mark.parametrize(
    ("codes", "scale", "groups", "message"),
    [
        (torch.full((4, 8), 8, dtype=torch.int8), torch.ones(4, 2), 2, "codes go from 8 to 8, which 4 bits do not"),
        (torch.zeros(4, 8), torch.ones(4, 2), 2, r"codes is torch\.float32"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 3), 2, r"2 groups do not fit codes \[4, 8\]"),
        (torch.zeros(4, 9, dtype=torch.int8), torch.ones(4, 2), 2, r"2 groups do not fit codes \[4, 9\]"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.full((4, 2), 1.001), 2, "no bfloat16 values"),
    ],
)
def test_a_weight_that_does_not_fit(codes: Tensor, scale: Tensor, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NativeWeight(codes, scale, groups, 4)


@pytest.mark.parametrize(
    ("codes", "scale", "sums"),
    [
        ((2, 3, 5), (3, 2), (2, 3)),
        ((1, 3, 4), (3, 2), (2, 3)),
        ((2, 3, 4), (2, 2), (2, 3)),
        ((2, 3, 4), (3, 3), (2, 3)),
        ((2, 3, 4), (3, 2), (2, 2)),
    ],
)
def test_factors_that_do_not_fit(codes: tuple[int, ...], scale: tuple[int, ...], sums: tuple[int, ...]) -> None:
    weight = NativeWeight(torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 2), 2, 4)
    with pytest.raises(ValueError, match=r" is torch|do not fit"):
        weight.matmul(torch.zeros(codes, dtype=torch.int8), torch.ones(scale), torch.zeros(sums, dtype=torch.int32))


def test_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "omega_qvla._native", None)
    library._compiled.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"without a C\+\+ compiler") as told:
            assert native.available() == () == native.available()
        assert len(told) == 1
        with pytest.raises(native.NativeUnavailableError, match="no compiled kernels"):
            NativeInput("site", 64)
    finally:
        library._compiled.cache_clear()
