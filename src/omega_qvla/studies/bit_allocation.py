"""What QVLA's allocation gives to whom, and whether its first-order cost ranks channels as measurement does (QVLA
§3.3, Figure 7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omega_qvla.calibration import Needs, SiteStatistics, collect
from omega_qvla.evaluation.results import write_text
from omega_qvla.numerics.allocation import rank_agreement
from omega_qvla.pack.rows import packed_bytes
from omega_qvla.policy import Observation, QuantizablePolicy
from omega_qvla.quantization.sensitivity import (
    ActionProbe,
    ChannelNoise,
    Sensitivity,
    allocate_bits,
    channel_noise,
    evenly_spread,
    measure_sensitivity,
)
from omega_qvla.spec import CHANNEL_WIDTHS, AllocationSpec, Part
from omega_qvla.studies.rendering import COLOURS, figure, markdown_table, write_csv
from omega_qvla.studies.study import Cell, Options, Result
from omega_qvla.studies.sweep import digest
from omega_qvla.studies.workbench import open_workbench

BUDGETS = (8.0, 6.0, 4.0, 3.0)
PARTS: tuple[Part, ...] = ("vision", "language")
SAMPLED = 128
"""Channels drawn at random whose cost at four bits is measured beside the first-order one."""
OBSERVATIONS = 8
"""On which both are taken: the cost differs greatly between observations."""
SPEC = AllocationSpec(average_bits=BUDGETS[0], remeasured=0)
_FOUR = CHANNEL_WIDTHS.index(4)


def measure(source: str, checkpoint: Path) -> Result:
    """Both costs of sampled channels, and the widths that every budget buys."""
    bench = open_workbench(checkpoint)
    noises, widths_in = _noises(bench.policy, bench.calibration)
    sensitivity = measure_sensitivity(bench.policy, noises, bench.calibration, SPEC)
    return {
        "source": source,
        "channels": _both_costs(bench.policy, bench.calibration, noises),
        "budgets": [_bought(sensitivity, widths_in, budget) for budget in BUDGETS],
    }


def _noises(policy: QuantizablePolicy, observations: Observation) -> tuple[dict[str, ChannelNoise], dict[str, int]]:
    """Rounding errors of every linear of PARTS, and its input width."""
    sites = [site for site in policy.sites() if site.part in PARTS]
    statistics = collect(policy, {site: Needs(hessian=True) for site in sites}, observations, noise_seed=0)
    noises: dict[str, ChannelNoise] = {}
    widths: dict[str, int] = {}
    for site in sites:
        for name in site.linears:
            weight = policy.module.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            noises[name], widths[name] = _noise(weight, statistics[site.name]), weight.shape[1]
    return noises, widths


def _noise(weight: Tensor, statistics: SiteStatistics) -> ChannelNoise:
    assert statistics.hessian is not None
    return channel_noise(weight, statistics.hessian, statistics.tokens)


def _both_costs(
    policy: QuantizablePolicy, observations: Observation, noises: Mapping[str, ChannelNoise]
) -> list[dict[str, Any]]:
    probe = ActionProbe(policy, evenly_spread(observations, OBSERVATIONS), noise_seed=0)
    gains = probe.gains(list(noises), SPEC.directions)
    read = [(name, channel) for name in noises for channel in range(len(gains[name])) if gains[name][channel] > 0]
    drawn = torch.randperm(len(read), generator=torch.Generator().manual_seed(0))[:SAMPLED]
    return [
        {
            "linear": name,
            "channel": channel,
            "proxy": float(noises[name].variance[channel, _FOUR] * gains[name][channel]),
            "exact": float(probe.effects(name, channel, noises[name].rounding)[_FOUR - 1]),
        }
        for name, channel in (read[index] for index in sorted(drawn.tolist()))
    ]


def _bought(sensitivity: Sensitivity, in_features: Mapping[str, int], budget: float) -> dict[str, Any]:
    """Channels of each width by part and kind of linear, and the bytes that they take."""
    found = allocate_bits(sensitivity, in_features, budget)
    counts: dict[str, Counter[int]] = {}
    for name, widths in found.items():
        part = "vision" if "vision" in name else "language"
        counts.setdefault(f"{part} {name.rpartition('.')[2]}", Counter()).update(widths.tolist())
    weights = sum(len(widths) * in_features[name] for name, widths in found.items())
    return {
        "average_bits": budget,
        "channels": {kind: {str(width): count[width] for width in CHANNEL_WIDTHS} for kind, count in counts.items()},
        "bytes": sum(packed_bytes(widths, in_features[name]) for name, widths in found.items()),
        "allowed_bytes": weights * budget / 8,
    }


@dataclass(frozen=True)
class BitAllocation:
    """See `omega_qvla.studies.study.Study`."""

    name: str = "bit-allocation"
    summary: str = (
        "The first-order cost of rounding a channel to four bits against the measured one, for channels of vision "
        "and language drawn at random, and the widths that the greedy allocation buys under each budget."
    )
    published: str = "QVLA Algorithm 1 and Figure 7"

    def cells(self, options: Options) -> list[Cell]:
        settings = {"budgets": BUDGETS, "sampled": SAMPLED, "observations": OBSERVATIONS, "spec": asdict(SPEC)}
        return [
            Cell(
                source,
                {"source": source, "checkpoint": digest(checkpoint), **settings},
                partial(measure, source, checkpoint),
            )
            for source, checkpoint in options.sources.items()
        ]

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        rows = [{"source": result["source"], **row} for result in results.values() for row in result["channels"]]
        write_csv(out / f"{self.name}.csv", rows)
        parts = [f"# {self.name}\n\n{self.summary}\n\n![{self.name}]({self.name}.svg)\n"]
        parts += [f"## {result['source']}\n\n{_section(result)}" for result in results.values()]
        parts.append(
            "## Published, not measured here\n\nQVLA Figure 7 compares ranks too, of a single step's sensitivity "
            "with the one cumulated over steps, for 1,000 channels of OpenVLA: about 80 % lie near the diagonal.\n"
        )
        write_text(out / f"{self.name}.md", "\n".join(parts))
        with figure(out / f"{self.name}.svg", 9.4, 3.4 * len(results)) as drawn:
            panels = drawn.subplots(len(results), 2, squeeze=False)
            for (left, right), result in zip(panels, results.values(), strict=True):
                _plot_costs(left, result)
                _plot_widths(right, result)


def _costs(channels: Sequence[Mapping[str, Any]], key: str) -> Tensor:
    return torch.tensor([channel[key] for channel in channels], dtype=torch.float64)


def _section(result: Result) -> str:
    channels = result["channels"]
    proxy, exact = _costs(channels, "proxy"), _costs(channels, "exact")
    agreement = rank_agreement(proxy, exact)
    ratio = float((exact / proxy).median())
    columns = ("average bits", *(f"{width} bits" for width in CHANNEL_WIDTHS), "bytes", "allowed")
    table = []
    for budget in result["budgets"]:
        totals = [sum(count[str(width)] for count in budget["channels"].values()) for width in CHANNEL_WIDTHS]
        shares = [f"{total / sum(totals):.1%}" for total in totals]
        size = [f"{budget[key]:,.0f}" for key in ("bytes", "allowed_bytes")]
        table.append([f"{budget['average_bits']:g}", *shares, *size])
    return (
        f"Of {len(channels)} channels, Spearman's rank correlation of the two costs is {agreement.spearman:.2f}, and "
        f"{agreement.near_diagonal:.0%} lie in the same or a neighbouring tenth of the ranks. The measured cost is "
        f"{ratio:.2f} times the first-order one in the median.\n\nShare of the channels by width:\n\n"
        + markdown_table(columns, table)
    )


def _plot_costs(axes: Any, result: Result) -> None:
    for colour, part in zip(COLOURS, PARTS, strict=False):
        channels = [row for row in result["channels"] if ("vision" in row["linear"]) == (part == "vision")]
        axes.loglog(_costs(channels, "proxy"), _costs(channels, "exact"), "o", ms=3, color=colour, label=part)
    ends = [float(_costs(result["channels"], "exact").min()), float(_costs(result["channels"], "exact").max())]
    axes.loglog(ends, ends, color=COLOURS[-1], lw=0.6)
    axes.set_title(f"{result['source']}: E‖ΔA‖² of a channel at 4 bits")
    axes.set_xlabel("first order, σ² · ‖J‖²")
    axes.set_ylabel("measured")
    axes.legend()


def _plot_widths(axes: Any, result: Result) -> None:
    budget = next(found for found in result["budgets"] if found["average_bits"] == 4.0)
    kinds = list(budget["channels"])
    left = [0.0] * len(kinds)
    for colour, width in zip(COLOURS, CHANNEL_WIDTHS, strict=False):
        shares = [100 * count[str(width)] / sum(count.values()) for count in budget["channels"].values()]
        axes.barh(kinds, shares, left=left, color=colour, label=f"{width} bits")
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_title(f"{result['source']}: channels by width at 4 bits on average, %")
    axes.legend(ncols=5, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08))


STUDY = BitAllocation()
