"""What was measured, for people and programs: Markdown, plots and JSON beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from omega_qvla.bench.layers import Measured, SiteResult
from omega_qvla.bench.policies import PolicyTimes
from omega_qvla.evaluation.results import describe_machine, write_text
from omega_qvla.kernels import native
from omega_qvla.studies.rendering import COLOURS, NOTHING, REFERENCE_COLOUR, figure, markdown_table

_FLOAT32 = "torch float32"
_STAGES = ("before", "vision", "language", "action", "step", "after")
_BAR = 0.8


def write_layers(out: Path, results: Sequence[SiteResult], versions: dict[str, str], rounds: int) -> None:
    """`layers.md`, `layers.svg` and `layers.json` in the directory `out`."""
    sites = [asdict(result) | {"of_limit": [each.of_limit for each in result.measured]} for result in results]
    _write_json(out / "layers.json", {"rounds": rounds, "sites": sites, "versions": versions})
    parts = [_heading("Linears of released policies", versions)]
    for threads in sorted({result.threads for result in results}):
        chosen = [result for result in results if result.threads == threads]
        memory, arithmetic = (
            median(getattr(result.limits, name) / 1e9 for result in chosen)
            for name in ("bytes_per_second", "products_per_second")
        )
        parts.append(
            f"## {_threads(threads)}\n\nRatios of medians. Limits, measured in turn with the rest: {memory:.1f} GB/s "
            f"from memory, {arithmetic:.0f} G multiply-adds/s in registers ({native.available()[0]}).\n\n"
        )
        parts.append(layers_table(chosen))
        parts.append("\nMedian milliseconds (interquartile range):\n\n" + _times_table(chosen) + "\n")
        problems = [m for result in chosen for m in result.measured if m.problem]
        parts += [f"- not timed: {each.problem}\n" for each in problems]
    write_text(out / "layers.md", "".join(parts))
    _draw_layers(out / "layers.svg", results)


def layers_table(results: Sequence[SiteResult]) -> str:
    """Markdown: this package's first contender against the best peers, as ratios of medians."""
    columns = [
        "site",
        "tokens×in×out",
        "ms",
        "of the limit",
        "× torch float32",
        "× best peer with 4-bit weights",
        "× best peer with 8-bit weights",
        "× best peer",
    ]
    rows = []
    for result in results:
        own = result.measured[0]
        best = [
            result.fastest(lambda each: each.weight_bits == 4),
            result.fastest(lambda each: each.weight_bits == 8),
            result.fastest(lambda each: True),
        ]
        baseline = result.times(_FLOAT32)
        rows.append(
            [
                result.site.label,
                result.site.shape,
                f"{own.times.p50:.2f}" if own.times else NOTHING,
                f"{own.of_limit:.0%} ({own.limit})" if own.of_limit else NOTHING,
                f"{baseline.p50 / own.times.p50:.2f}" if own.times and baseline else NOTHING,
                *(_ratio(own, peer) for peer in best),
            ]
        )
    return markdown_table(columns, rows)


def write_policies(out: Path, found: Sequence[PolicyTimes], versions: dict[str, str], rounds: int) -> None:
    """`policies.md`, `policies.svg` and `policies.json` in the directory `out`."""
    document = {"rounds": rounds, "policies": [asdict(each) for each in found], "versions": versions}
    _write_json(out / "policies.json", document)
    parts = [_heading("Whole policies: one chunk of actions", versions)]
    for threads in sorted({each.threads for each in found}):
        chosen = [each for each in found if each.threads == threads]
        parts.append(f"## {_threads(threads)}\n\n" + policies_table(chosen) + "\n")
    write_text(out / "policies.md", "".join(parts))
    _draw_policies(out / "policies.svg", found)


def policies_table(found: Sequence[PolicyTimes]) -> str:
    """Markdown: each policy's chunk and stages; ratios to the first."""
    columns = ["policy", "p50 ms", "p95", "p99", "spread", "× the first", *(f"{name} ms" for name in _STAGES), "MB"]
    rows = [
        [
            f"{each.label} ({each.execution})",
            f"{each.whole.p50:.1f}",
            f"{each.whole.p95:.1f}",
            f"{each.whole.p99:.1f}",
            f"{each.whole.spread:.1f}",
            f"{found[0].whole.p50 / each.whole.p50:.2f}",
            *(f"{each.stages[name].p50:.1f}" for name in _STAGES),
            f"{each.resident_bytes / 1e6:.0f}",
        ]
        for each in found
    ]
    return markdown_table(columns, rows)


def _ratio(own: Measured, peer: Measured | None) -> str:
    if own.times is None or peer is None or peer.times is None:
        return NOTHING
    return f"{peer.times.p50 / own.times.p50:.2f} ({peer.contender})"


def _times_table(results: Sequence[SiteResult]) -> str:
    names = [each.contender for each in results[0].measured]
    rows = [
        [
            result.site.label,
            *(
                NOTHING if each.times is None else f"{each.times.p50:.2f} ({each.times.spread:.2f})"
                for each in result.measured
            ),
        ]
        for result in results
    ]
    return markdown_table(["site", *names], rows)


def _draw_layers(path: Path, results: Sequence[SiteResult]) -> None:
    threads = sorted({result.threads for result in results})
    with figure(path, 9.0, 1.0 + 0.55 * len(results)) as drawn:
        for axes, count in zip(drawn.subplots(1, len(threads), squeeze=False)[0], threads, strict=True):
            chosen = [result for result in results if result.threads == count]
            names = [each.contender for each in chosen[0].measured if each.contender != _FLOAT32]
            height = _BAR / len(names)
            for place, name in enumerate(names):
                speeds = [_speed_up(result, name) for result in chosen]
                rows = [row + (place - (len(names) - 1) / 2) * height for row in range(len(chosen))]
                axes.barh(rows, speeds, 0.9 * height, color=COLOURS[place % len(COLOURS)], label=name)
            axes.axvline(1, color=REFERENCE_COLOUR, linewidth=0.8)
            axes.set_yticks(range(len(chosen)), [result.site.label for result in chosen])
            axes.set_ylim(len(chosen) - 0.5, -0.5)
            axes.set_xlabel(f"times as fast as {_FLOAT32}, {_threads(count)}")
            axes.grid(axis="x")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _speed_up(result: SiteResult, name: str) -> float:
    own, baseline = result.times(name), result.times(_FLOAT32)
    return baseline.p50 / own.p50 if own and baseline else 0.0


def _draw_policies(path: Path, found: Sequence[PolicyTimes]) -> None:
    shown = [name for name in _STAGES if name != "step"]
    with figure(path, 8.0, 1.2 + 0.4 * len(found)) as drawn:
        axes = drawn.subplots()
        left = [0.0] * len(found)
        for place, name in enumerate(shown):
            widths = [each.stages[name].p50 for each in found]
            axes.barh(range(len(found)), widths, _BAR, left=left, color=COLOURS[place], label=name)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(found)), [f"{each.label}, {_threads(each.threads)}" for each in found])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds of one chunk, median of each stage")
        axes.grid(axis="x")
        drawn.legend(loc="outside lower center", ncols=len(shown))


def _heading(title: str, versions: dict[str, str]) -> str:
    machine = describe_machine()
    used = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    return f"# {title}\n\n{machine.created}, {machine.cpu}, {machine.platform}; {used}.\n\n"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_text(path, json.dumps({"machine": asdict(describe_machine())} | document, indent=1, allow_nan=False) + "\n")
