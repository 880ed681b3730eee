"""What is timed, and what is said of it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omega_qvla.bench.contenders import Contender, Multiply, Ours, TorchFloat, TorchInteger
from omega_qvla.bench.layers import Measured, SiteResult, measure_layers
from omega_qvla.bench.report import layers_table, write_layers
from omega_qvla.bench.roofline import Limits
from omega_qvla.bench.sites import SITES, BenchSite
from omega_qvla.bench.timing import Times, interleaved
from omega_qvla.kernels import native

SITE = BenchSite("pi05", "action", "o", 3, 128, 32)


class Wrong(TorchFloat):
    """A library that forgets a channel."""

    name = "wrong"

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.name = "wrong"

    def prepare(self, weight: Tensor, tokens: int | None, threads: int) -> Multiply:
        return lambda x: x[:, 1:] @ weight[:, 1:].t()


@pytest.mark.skipif(not native.available(), reason="no kernels were compiled")
def test_layers_are_measured_and_reported(tmp_path: Path) -> None:
    compared: list[Contender] = [Ours(4, 4, 64), TorchFloat(torch.float32), TorchInteger(), Wrong()]
    seen: list[str] = []
    before = torch.get_num_threads()
    results = measure_layers([SITE], compared, [1], 1, on_site=lambda result: seen.append(result.site.label))
    assert torch.get_num_threads() == before and seen == ["pi05 action o"]
    (result,) = results
    own, baseline, integer, wrong = result.measured
    assert own.ours and own.times is not None and baseline.times is not None and own.of_limit is not None
    assert wrong.times is None and wrong.problem is not None and "wrong is off by" in wrong.problem
    assert result.fastest(lambda each: each.weight_bits == 8) == integer
    assert result.fastest(lambda each: each.weight_bits == 4) is None
    write_layers(tmp_path, results, {"torch": "2"}, 1)
    text = (tmp_path / "layers.md").read_text()
    assert "wrong is off by" in text and "| pi05 action o | 3×128×32 |" in text and "GB/s" in text
    assert json.loads((tmp_path / "layers.json").read_text())["sites"][0]["measured"][0]["times"]["p99"] > 0
    assert (tmp_path / "layers.svg").read_text().startswith("<?xml")


def measured(name: str, bits: int, p50: float | None, ours: bool = False) -> Measured:
    times = None if p50 is None else Times(p50, p50, p50, p50, 0, 1)
    return Measured(name, bits, bits, ours, times, None if times else f"{name} is off", 0.5, "memory")


def test_no_speed_up_for_what_is_not_exact() -> None:
    peers = [measured("torch float32", 32, 4), measured("eight", 8, 3), measured("four", 4, 2)]
    exact = layers_table([SiteResult(SITE, Limits(1, 1e9, 1e9), [measured("omega-qvla", 4, 1, ours=True), *peers])])
    assert exact.splitlines()[-1] == (
        "| pi05 action o | 3×128×32 | 1.00 | 50% (memory) | 4.00 | 2.00 (four) | 3.00 (eight) | 2.00 (four) |"
    )
    inexact = layers_table(
        [SiteResult(SITE, Limits(1, 1e9, 1e9), [measured("omega-qvla", 4, None, ours=True), *peers])]
    )
    assert inexact.splitlines()[-1] == "| pi05 action o | 3×128×32 | – | – | – | – | – | – |"


def test_the_limit_is_the_larger_of_two() -> None:
    limits = Limits(1, bytes_per_second=1e9, products_per_second=1e9)
    narrow, wide = BenchSite("p", "action", "a", 1, 1000, 1000), BenchSite("p", "action", "a", 100, 1000, 1000)
    assert limits.of(narrow, 16) == (pytest.approx(2.0), "memory")
    assert limits.of(wide, 4) == (pytest.approx(100.0), "arithmetic")


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert set(times) == {"a", "b"} and all(each.calls >= 2 for each in times.values())
    assert "".join(a for a, b in pairwise([*order, ""]) if a != b) == "ababab"
    with pytest.raises(ValueError, match="at least one round, not 0"):
        interleaved({}, 0)


def test_sites_are_those_of_the_models() -> None:
    assert len(set(SITES)) == len(SITES)
    for site in SITES:
        assert site.channels % 64 == 0 and site.outputs % 16 == 0
