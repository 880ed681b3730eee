"""Products of bfloat16 on processors that have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PRODUCTS = (
    torch.matmul,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    F.linear,
    F.conv2d,
    F.scaled_dot_product_attention,
)


_opened = local()
"""`count`: by how many the mode is open in a thread."""


@contextmanager
def float_products() -> Iterator[None]:
    """While open, CPUs multiply bfloat16 tensors in float32 and round the result, as if they had such products.

    Without them torch takes up to forty times as long: seconds for the attention of one layer of pi0.5. Inferences
    of one thread that take turns may open and close it in any order.
    """
    count = getattr(_opened, "count", 0)
    if count == 0:
        _opened.mode = _FloatProducts()
        _opened.mode.__enter__()
    _opened.count = count + 1
    try:
        yield
    finally:
        _opened.count -= 1
        if _opened.count == 0:
            _opened.mode.__exit__(None, None, None)


class _FloatProducts(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func not in _PRODUCTS or not _short(args[0]):
            return func(*args, **given)
        widened = {key: value.float() if _short(value) else value for key, value in given.items()}
        return func(*(value.float() if _short(value) else value for value in args), **widened).to(torch.bfloat16)


def _short(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"
