"""Variants of one source beside its full precision: paired statistics, and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omega_qvla.evaluation.statistics import PairedComparison, SuccessRate, compare, success_rate
from omega_qvla.studies.rendering import NOTHING, markdown_table
from omega_qvla.studies.study import Result

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Judged:
    """A variant's result beside full precision of its source."""

    result: Result
    success: SuccessRate | None
    """None if no episodes were run."""
    paired: PairedComparison | None
    """None for full precision itself, and where it or the episodes are missing."""
    holm: float | None
    """p-value of `paired`, adjusted for the number of variants tested."""


def compare_with_full_precision(results: Mapping[str, Result]) -> dict[str, Judged]:
    """The variants of one source, by any keys in any order, one of them possibly of full precision."""
    reference = next((_outcomes(result) for result in results.values() if result["recipe"] is None), {})
    paired = {
        key: compare(_outcomes(result), reference)
        for key, result in results.items()
        if result["recipe"] is not None and result["episodes"] and reference
    }
    adjusted = dict(zip(paired, holm([found.p_value for found in paired.values()]), strict=True))
    return {
        key: Judged(result, _success(result), paired.get(key), adjusted.get(key)) for key, result in results.items()
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for testing them all (Holm 1979, Scandinavian Journal of Statistics 6): those below 0.05
    contain a false one with a probability of at most 0.05, whatever the dependence between the tests."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


COLUMNS = (
    "execution",
    "success",
    "95 % interval",
    "difference",
    "wins–losses",
    "p",
    "action nMSE",
    "MB codes and scales",
    "MB on disk",
    "separable",
    "separable, Holm",
)


def table(judged: Mapping[str, Judged], heads: Mapping[str, Sequence[str]], columns: Sequence[str]) -> str:
    """A Markdown table of `COLUMNS`; before them `columns`, whose cells are `heads` by key."""
    return markdown_table([*columns, *COLUMNS], [[*heads[key], *_cells(found)] for key, found in judged.items()])


def explanation(judged: Mapping[str, Judged]) -> str:
    """What the columns mean and how many tests there were."""
    tested = sum(found.paired is not None for found in judged.values())
    return (
        "Success has its 95 % Wilson interval. The difference to full precision on the same episodes and noise is in "
        "percentage points with Newcombe's 95 % interval for paired proportions; wins are episodes that only the "
        "quantized policy solves, p is McNemar's exact two-sided value. `separable` from full precision means "
        f"p < {SIGNIFICANCE}: {tested} variants were tested, of which {tested * SIGNIFICANCE:.1f} would be expected "
        "to pass if none differed; Holm's correction keeps the chance of any false one at 5 %. Action nMSE is the "
        "squared error of actions on held-out observations over their spread: 0 is equality, 1 no better than a "
        "constant. `integer` recipes can run on integer products, `dequantized` ones store codes and multiply in "
        "floating point, `simulated` ones have scales that no integer product can apply; all were run simulated "
        "here, which is the same function. MB is 10^6 bytes.\n"
    )


def csv_row(judged: Judged) -> dict[str, Any]:
    """All figures of a variant; None where there is none."""
    success, paired, result = judged.success, judged.paired, judged.result
    return {
        "source": result["source"],
        "label": result["label"],
        "execution": result["execution"],
        "successes": success and success.successes,
        "episodes": success and success.episodes,
        "success_low": success and success.low,
        "success_high": success and success.high,
        "difference": paired and paired.difference,
        "difference_low": paired and paired.low,
        "difference_high": paired and paired.high,
        "wins": paired and paired.wins,
        "losses": paired and paired.losses,
        "p": paired and paired.p_value,
        "p_holm": judged.holm,
        "action_nmse": result.get("action_nmse"),
        **{f"bytes_{kind}": size for kind, size in result["bytes"].items()},
    }


def _outcomes(result: Result) -> dict[tuple[str, int], bool]:
    return {(task, seed): success for task, seed, success, _ in result["episodes"]}


def _success(result: Result) -> SuccessRate | None:
    outcomes = _outcomes(result)
    return success_rate(sum(outcomes.values()), len(outcomes)) if outcomes else None


def _cells(judged: Judged) -> list[str]:
    result, rate, paired, size = judged.result, judged.success, judged.paired, judged.result["bytes"]
    codes = None if size["codes"] is None else size["codes"] + size["scales"]
    return [
        result["execution"],
        NOTHING if rate is None else f"{100 * rate.rate:.1f} % ({rate.successes}/{rate.episodes})",
        NOTHING if rate is None else f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]",
        NOTHING if paired is None else f"{paired.difference:+.1f} [{paired.low:+.1f}, {paired.high:+.1f}]",
        NOTHING if paired is None else f"{paired.wins}–{paired.losses}",
        NOTHING if paired is None else _p_value(paired.p_value),
        f"{result['action_nmse']:.2e}" if "action_nmse" in result else NOTHING,
        NOTHING if codes is None else f"{codes / 1e6:.2f}",
        f"{size['total'] / 1e6:.2f}",
        _separable(None if paired is None else paired.p_value),
        _separable(judged.holm),
    ]


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _separable(p_value: float | None) -> str:
    return NOTHING if p_value is None else "yes" if p_value < SIGNIFICANCE else "no"
