"""What the commands on checkpoints print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from omega_qvla.cli.shared import ERR, OUT
from omega_qvla.pack.inspect import CheckpointReport, PartReport, planned_parts
from omega_qvla.pack.manifest import Plan

if TYPE_CHECKING:
    from omega_qvla.quantization.preflight import Preflight

RECIPE_TABLE_WIDTH = 160
LINEAR_TABLE_WIDTH = 200
"""Layers have long names, and a name cut short names nothing."""
KEPT_MODULES = 5
"""Of what is kept in floating point, those listed: the largest."""


def print_wide(table: Table, width: int) -> None:
    """Print a table in at least so many columns, however narrow the terminal."""
    Console(width=max(OUT.width, width)).print(table)


def print_preflight(needs: Preflight) -> None:
    """What a run needs, before it starts."""
    memory = ", ".join(f"{what} {size / 2**30:.1f}" for what, size in asdict(needs.memory).items())
    ERR.print(
        f"needs {needs.memory.total / 2**30:.1f} GiB of memory ({memory}) and {needs.disk / 2**30:.1f} GiB of disk; "
        f"about {needs.forward_seconds / 60:.0f} minutes of calibration inferences and "
        f"{needs.solving_seconds / 60:.0f} of quantization",
        soft_wrap=True,
    )


def print_linears(report: CheckpointReport) -> None:
    """Every linear of a quantized checkpoint."""
    longest = max(len(linear.name) for linear in report.linears)
    name = Column("linear", no_wrap=True, min_width=longest)
    table = Table(name, "part", "bits", "scales: weight / activation", "execution", "bytes", "because")
    for linear in report.linears:
        bits = f"W{linear.weight_bits:.3g}A{linear.activation_bits}" if linear.quantized else "kept"
        row = (
            linear.name,
            linear.part,
            bits,
            linear.granularity,
            linear.execution,
            f"{linear.bytes:,}",
            linear.because,
        )
        table.add_row(*row)
    print_wide(table, LINEAR_TABLE_WIDTH)


def print_plan(plan: Plan, *, as_json: bool) -> None:
    """What would become of every linear of a checkpoint in floating point."""
    parts = planned_parts(plan)
    if as_json:
        sizes = {part: asdict(each) for part, each in parts.items()}
        print(json.dumps({"parts": sizes, "linears": [asdict(each) for each in plan.linears]}, indent=1))
        return
    table = Table("linear", "part", "in", "out", "because")
    rules = {site.name: site.rule for site in plan.sites}
    for linear in plan.linears:
        because = linear.kept_because or f"rule {rules[linear.site or '']} of {plan.recipe.name}"
        table.add_row(linear.name, linear.part or "-", str(linear.in_features), str(linear.out_features), because)
    print_wide(table, LINEAR_TABLE_WIDTH)
    kept = sum(each.site is None for each in plan.linears)
    OUT.print(f"{plan.recipe.name} would quantize: {_counted(parts)}; {kept} linears are kept", soft_wrap=True)


def print_totals(report: CheckpointReport) -> None:
    """The bytes of a quantized checkpoint."""
    table = Table("what", "bytes", "share", title=f"{report.recipe} ({report.execution})", title_justify="left")
    lines = {
        f"codes of {report.quantized_linears} linears": report.codes_bytes,
        "scales": report.scales_bytes,
        "rotations": report.rotation_bytes,
        "low-rank branches": report.low_rank_bytes,
        "permutations": report.permutation_bytes,
        "factors per channel": report.factor_bytes,
        "tables per denoising step": report.step_table_bytes,
        f"kept in floating point ({report.kept_linears} linears, and all else)": report.kept_bytes,
        "all files": report.total_bytes,
    }
    lines |= {f"kept: {module}": size for module, size in list(report.kept_by_module.items())[:KEPT_MODULES]}
    for what, size in lines.items():
        table.add_row(what, f"{size:,}", f"{size / report.total_bytes:.1%}")
    OUT.print(table)
    OUT.print(
        f"quantized: {_counted(report.parts) or 'nothing'}; all that is stored for them takes "
        f"{report.quantized_share:.1%} of the {report.fp16_bytes:,} bytes that these weights take at 16 bits, "
        f"codes and scales {report.codes_and_scales_share:.1%}",
        soft_wrap=True,
    )


def _counted(parts: Mapping[str, PartReport]) -> str:
    return ", ".join(f"{part} {x.linears} linears of {x.weights:,} weights" for part, x in parts.items())
