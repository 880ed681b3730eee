"""Products of bfloat16 in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omega_qvla.policies.float_products import float_products

X, Y = torch.randn(2, 5, 8).bfloat16(), torch.randn(2, 8, 8).bfloat16()

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": torch.matmul,
    "operator": lambda x, y: x @ y,
    "method": lambda x, y: x.matmul(y),
    "bmm": torch.bmm,
    "linear": lambda x, y: F.linear(x, y[0], bias=y[1, 0]),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, value=y),
    "convolution": lambda x, y: F.conv2d(x[:, None], y[:1, None, :3, :3]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_they_are_those_of_float32_rounded(name: str) -> None:
    with float_products():
        found = PRODUCTS[name](X, Y)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, PRODUCTS[name](X.float(), Y.float()).bfloat16())


@pytest.mark.parametrize("name", PRODUCTS)
def test_other_dtypes_are_left_alone(name: str) -> None:
    with float_products():
        assert torch.equal(PRODUCTS[name](X.double(), Y.double()), PRODUCTS[name](X.double(), Y.double()))
        assert PRODUCTS[name](X.double(), Y.double()).dtype == torch.float64
        assert (X + X).dtype == torch.bfloat16


def test_modules_are_reached() -> None:
    linear = nn.Linear(8, 3, dtype=torch.bfloat16)
    with torch.no_grad(), float_products():
        found = linear(X)
    expected = F.linear(X.float(), linear.weight.float(), linear.bias.float()).bfloat16()
    assert torch.equal(found, expected)


def test_it_is_closed_in_any_order() -> None:
    stacks = [ExitStack(), ExitStack()]
    for stack in stacks:
        stack.enter_context(float_products())
    assert len(torch.overrides._get_current_function_mode_stack()) == 1
    stacks[0].close()
    assert torch.equal(X @ Y, (X.float() @ Y.float()).bfloat16())
    stacks[1].close()
    assert torch.overrides._get_current_function_mode_stack() == []
