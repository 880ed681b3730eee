"""The linears of released policies, one input site after another, against other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from omega_qvla.bench.contenders import (
    Contender,
    InexactError,
    Multiply,
    OneDnn,
    OnnxDynamic,
    OnnxFloat,
    OnnxFourBits,
    OpenVino,
    Ours,
    TorchFloat,
    TorchInteger,
)
from omega_qvla.bench.roofline import Limit, Limits, Probe
from omega_qvla.bench.sites import BenchSite
from omega_qvla.bench.timing import Times, interleaved, torch_threads

_COLD = 96 * 2**20
"""Bytes of weights that a contender goes through before it meets the first again: in a policy, weights come from
memory."""
_MOST_COPIES = 24
_OUTLIERS = 8
"""Channels of the input whose values are ten times as large."""


def contenders() -> list[Contender]:
    """Those that are compared; this package's own come first."""
    return [
        Ours(4, 4, 64),
        Ours(4, 8, 64),
        TorchFloat(torch.float32),
        TorchFloat(torch.bfloat16),
        TorchInteger(),
        OneDnn(),
        OnnxFloat(),
        OnnxDynamic(),
        OnnxFourBits(),
        OpenVino(),
    ]


@dataclass(frozen=True)
class Measured:
    """One contender on one site."""

    contender: str
    weight_bits: int
    input_bits: int
    ours: bool
    times: Times | None
    """None if it failed its check."""
    problem: str | None
    limit_ms: float
    limit: Limit

    @property
    def of_limit(self) -> float | None:
        """Share of the roofline that the median reaches."""
        return None if self.times is None else self.limit_ms / self.times.p50


@dataclass(frozen=True)
class SiteResult:
    """All contenders on one site."""

    site: BenchSite
    limits: Limits
    """Measured among the contenders."""
    measured: list[Measured]

    @property
    def threads(self) -> int:
        return self.limits.threads

    def times(self, contender: str) -> Times | None:
        return next((each.times for each in self.measured if each.contender == contender), None)

    def fastest(self, admitted: Callable[[Measured], bool]) -> Measured | None:
        """The fastest peer of those that are `admitted`."""
        peers = [each for each in self.measured if not each.ours and each.times is not None and admitted(each)]
        return min(peers, key=lambda each: each.times.p50 if each.times else 0, default=None)


def measure_layers(
    sites: Sequence[BenchSite],
    compared: Sequence[Contender],
    threads: Sequence[int],
    rounds: int,
    on_site: Callable[[SiteResult], None] = lambda result: None,
) -> list[SiteResult]:
    """Each site with each number of threads. Nothing is timed for a contender that fails its check: it is named with
    what was wrong."""
    results = []
    for count in threads:
        with torch_threads(count):
            for site in sites:
                result = _measure(site, compared, count, rounds)
                on_site(result)
                results.append(result)
    return results


def _measure(site: BenchSite, compared: Sequence[Contender], threads: int, rounds: int) -> SiteResult:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(site.outputs, site.channels, generator=generator) * 0.02
    x = torch.randn(site.tokens, site.channels, generator=generator)
    x[:, torch.randperm(site.channels, generator=generator)[:_OUTLIERS]] *= 10
    problems: dict[str, str] = {}
    probe = Probe(threads)
    calls: dict[str, Callable[[], object]] = {**probe.calls()}
    for contender in compared:
        copies = _copies(contender, weight)
        prepared = [contender.prepare(weight, site.tokens, threads) for _ in range(copies)]
        try:
            contender.check(weight, x, prepared[0])
        except InexactError as error:
            problems[contender.name] = str(error)
        else:
            calls[contender.name] = _in_turn(prepared, x)
    times = interleaved(calls, rounds)
    limits = probe.limits()
    measured = [
        Measured(
            each.name,
            each.weight_bits,
            each.input_bits,
            isinstance(each, Ours),
            times.get(each.name),
            problems.get(each.name),
            *limits.of(site, each.weight_bits),
        )
        for each in compared
    ]
    return SiteResult(site, limits, measured)


def _copies(contender: Contender, weight: Tensor) -> int:
    return max(1, min(_MOST_COPIES, _COLD // (weight.numel() * contender.weight_bits // 8)))


def _in_turn(prepared: Sequence[Multiply], x: Tensor) -> Callable[[], object]:
    turns = cycle(prepared)
    return lambda: next(turns)(x.view_as(x))  # another tensor each time: linears remember what they made of the last
