"""The two limits of a product: bytes of weights from memory, and products that the processor can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Literal

import torch

from omega_qvla.bench.sites import BenchSite
from omega_qvla.kernels import native

_BUFFER = 2**27
"""Bytes, far more than caches hold."""

Limit = Literal["memory", "arithmetic"]


@dataclass(frozen=True)
class Limits:
    """What this machine can do with so many threads, measured."""

    threads: int
    bytes_per_second: float
    """Read from memory."""
    products_per_second: float
    """Multiply-adds of bytes with the instructions that the compiled kernels use, all operands in registers."""

    def of(self, site: BenchSite, weight_bits: int) -> tuple[float, Limit]:
        """Milliseconds that no product of a site can go below, and why."""
        memory = site.channels * site.outputs * weight_bits / 8 / self.bytes_per_second
        arithmetic = site.products / self.products_per_second
        return 1000 * max(memory, arithmetic), "memory" if memory > arithmetic else "arithmetic"


class Probe:
    """Measures the limits in turn with what they limit: a machine that others use is as slow for both."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._buffer = torch.ones(_BUFFER // 8, dtype=torch.float64)
        self._bytes: list[float] = []
        self._products: list[float] = []

    def calls(self) -> Mapping[str, Callable[[], object]]:
        """To be called among the others."""
        return {"limit of memory": self._read, "limit of arithmetic": self._multiply}

    def limits(self) -> Limits:
        """The medians so far."""
        return Limits(self._threads, median(self._bytes), median(self._products))

    def _read(self) -> None:
        before = perf_counter()
        self._buffer.sum()
        self._bytes.append(_BUFFER / (perf_counter() - before))

    def _multiply(self) -> None:
        self._products.append(native.products_per_second(self._threads))
