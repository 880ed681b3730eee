"""Every library multiplies what it is asked to, and one that does not is found out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omega_qvla.bench import contenders as room
from omega_qvla.bench.contenders import Contender, InexactError, OnnxDynamic, OnnxFloat, OpenVino, Ours, TorchFloat
from omega_qvla.bench.layers import contenders
from omega_qvla.kernels import native

TOKENS, CHANNELS, OUTPUTS = 5, 256, 48


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    """W [out, in] and x [tokens, in] with channels that stand out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, CHANNELS, generator=generator)
    x[:, ::64] *= 10
    return torch.randn(OUTPUTS, CHANNELS, generator=generator), x


@pytest.mark.parametrize("contender", contenders(), ids=lambda each: each.name)
def test_each_multiplies(contender: Contender, problem: tuple[Tensor, Tensor]) -> None:
    weight, x = problem
    multiply = contender.prepare(weight, TOKENS, 1)
    contender.check(weight, x, multiply)
    assert multiply(x).shape == (TOKENS, OUTPUTS) and multiply(x).dtype == torch.float32
    assert contender.version


@pytest.mark.parametrize("contender", [OnnxFloat(), OnnxDynamic(), Ours(4, 4, 64)], ids=lambda c: c.name)
def test_any_number_of_tokens(contender: Contender, problem: tuple[Tensor, Tensor]) -> None:
    weight, x = problem
    multiply = contender.prepare(weight, None, 1)
    for tokens in (1, 3):
        contender.check(weight, x[:tokens], multiply)


def test_openvino_knows_the_number_of_tokens(problem: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="with a fixed number of tokens"):
        OpenVino().prepare(problem[0], None, 1)


def test_one_that_is_off_is_found_out(problem: tuple[Tensor, Tensor]) -> None:
    weight, x = problem
    with pytest.raises(InexactError, match=r"torch float32 is off by 0\.01 of the output, more than 1e-05"):
        TorchFloat(torch.float32).check(weight, x, lambda x: x @ weight.t() * 1.01)
    with pytest.raises(InexactError, match="is off by nan"):
        TorchFloat(torch.float32).check(weight, x, lambda x: x @ weight.t() * torch.nan)


def test_our_bits_are_checked(problem: tuple[Tensor, Tensor]) -> None:
    weight, x = problem
    contender = Ours(4, 4, 64)
    linear = contender.prepare(weight, TOKENS, 1)
    assert isinstance(linear, torch.nn.Module)
    linear.bias, linear._corrected = torch.full((OUTPUTS,), 1e-6), True
    with pytest.raises(InexactError, match="does not give the bits that 64-bit integers give"):
        contender.check(weight, x, linear)


def test_a_library_that_is_missing_is_named(problem: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(room, "import_module", missing)
    with pytest.raises(ImportError, match=r"openvino is missing: install omega-qvla\[bench\]"):
        OpenVino().prepare(problem[0], TOKENS, 1)


@pytest.mark.skipif(not native.available(), reason="no kernels were compiled")
@pytest.mark.parametrize("kernels", native.available())
@pytest.mark.parametrize("threads", [1, 2])
def test_the_rate_of_products_is_measured(kernels: str, threads: int) -> None:
    assert native.products_per_second(threads, kernels=kernels) > 1e7
