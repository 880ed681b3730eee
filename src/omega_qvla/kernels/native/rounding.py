"""The two long loops of quantizing a weight: scales are searched, columns are rounded.

Both give the same bits on every processor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omega_qvla.kernels.native.library import address, checked, chosen, compiled

_FLOATS = (torch.float32, torch.float64)


def search_scale(
    x: Tensor, peak: Tensor, fractions: Sequence[float], lowest: int, highest: int, *, kernels: str | None = None
) -> Tensor:
    """Of each group of x [groups, size] that fraction of its `peak` [groups], as bfloat16 stores it, whose codes from
    `lowest` to `highest` leave the smallest squared error; in x's dtype, float32 or float64.

    Raises `ValueError` for other shapes and dtypes.
    """
    groups, size = x.shape
    dtype = _float("x", x)
    x, peak = checked("x", x, dtype, groups, size), checked("peak", peak, dtype, groups)
    tried = torch.tensor(fractions, dtype=dtype)
    scale = torch.empty_like(peak)
    library = compiled()
    search = library.search_scale if dtype == torch.float32 else library.search_scale_double
    search(
        chosen(kernels),
        address(x),
        address(peak),
        groups,
        size,
        address(tried),
        len(tried),
        lowest,
        highest,
        address(scale),
        torch.get_num_threads(),
    )
    return scale


def round_columns(
    weight: Tensor,
    owed: Tensor,
    factor: Tensor,
    scale: Tensor,
    lowest: int,
    highest: int,
    *,
    kernels: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes int8 and errors of the columns `weight` [columns, outputs], rounded one after another so that each makes
    good what it owes: `owed` [columns, outputs] and the errors of the columns before it, by the columns' block of
    R `factor` [columns, columns]. `scale`: [outputs]. All float32 or all float64, rows of `owed` and `factor` may be
    apart.

    Raises `ValueError` for other shapes and dtypes.
    """
    columns, outputs = weight.shape
    dtype = _float("weight", weight)
    weight, scale = checked("weight", weight, dtype, columns, outputs), checked("scale", scale, dtype, outputs)
    owed, factor = _rows("owed", owed, dtype, columns, outputs), _rows("factor", factor, dtype, columns, columns)
    codes, errors = torch.empty(columns, outputs, dtype=torch.int8), torch.empty_like(weight)
    library = compiled()
    round_ = library.round_columns if dtype == torch.float32 else library.round_columns_double
    round_(
        chosen(kernels),
        address(weight),
        address(owed),
        owed.stride(0),
        address(factor),
        factor.stride(0),
        address(scale),
        columns,
        outputs,
        lowest,
        highest,
        address(codes),
        address(errors),
        torch.get_num_threads(),
    )
    return codes, errors


def _float(name: str, tensor: Tensor) -> torch.dtype:
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}, neither float32 nor float64")
    return tensor.dtype


def _rows(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """The tensor, in whose rows values are neighbours. Raises as `checked` does."""
    if tensor.dim() == len(shape) and tensor.stride(-1) == 1 and tensor.dtype == dtype and tensor.shape == shape:
        return tensor
    return checked(name, tensor, dtype, *shape)
