"""Quantize Vision-Language-Action policies to 4-bit weights and activations, run them, and prove that they work.

The three verbs are `quantize`, `load` and `evaluate`; see `omega_qvla.api`.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omega_qvla.api import evaluate, load, quantize

__all__ = ["evaluate", "load", "quantize"]
__version__ = "0.1.0"

# torch reads it at its first allocation: what is computed with a Hessian of a gigabyte would spend its time in page
# faults if pages were small.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    """The verbs, imported when they are first asked for: recipes can be read without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("omega_qvla.api"), name)
