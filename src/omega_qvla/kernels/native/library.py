"""The compiled module, if the installation has one."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch  # first: the compiled module shares its threads
from torch import Tensor

_MISSING = "omega-qvla was installed without a C++ compiler: it has no compiled kernels"

FEW_VALUES, FEW_PRODUCTS = 2**14, 2**19
"""Fewer values are rounded, and fewer products are summed, before a second thread is awake."""


class NativeUnavailableError(RuntimeError):
    """The package was installed without its compiled kernels."""


def available() -> tuple[str, ...]:
    """The kernels that this processor can run, the fastest first; none where nothing was compiled, of which the user
    is told once."""
    found = _compiled()
    return () if found is None else tuple(found.available())


def compiled() -> ModuleType:
    """The compiled module. Raises `NativeUnavailableError` if there is none."""
    found = _compiled()
    if found is None:
        raise NativeUnavailableError(_MISSING)
    return found


def chosen(kernels: str | None) -> str:
    """The kernels of that name, or the fastest. Raises `ValueError` if this processor does not run them."""
    names = compiled().available()
    if kernels is not None and kernels not in names:
        raise ValueError(f"this processor runs no kernels called {kernels!r}; it runs {', '.join(names)}")
    return str(kernels or names[0])


def products_per_second(threads: int, *, kernels: str | None = None) -> float:
    """Multiply-adds of bytes that so many threads do with the kernels' instructions, their operands in registers:
    measured, in some milliseconds."""
    return float(compiled().products_per_second(chosen(kernels), threads))


def threads_to_round(values: int) -> int:
    """Torch's threads, where so many values are worth them."""
    return 1 if values < FEW_VALUES else torch.get_num_threads()


def threads_to_multiply(products: int) -> int:
    """Torch's threads, where so many products are worth them."""
    return 1 if products < FEW_PRODUCTS else torch.get_num_threads()


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def checked(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """The tensor, contiguous. Raises `ValueError` if it is not of that dtype and shape, or not on the CPU."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, not {dtype} {list(shape)} on the CPU"
        )
    return tensor.contiguous()


@cache
def _compiled() -> ModuleType | None:
    try:
        return import_module("omega_qvla._native")
    except ImportError:
        warnings.warn(f"{_MISSING}, and multiplies integers by torch, slowly", RuntimeWarning, stacklevel=2)
        return None
