"""Which piece of a recipe does what: action error and layer error of one-line changes, on policy and twin.

    python benchmarks/ablation.py --out docs/results

Writes `ablation.json` and `ablation.md`. No episodes are run; errors are on held-out observations.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import Bench, changed

from omega_qvla import api
from omega_qvla.evaluation.results import write_text
from omega_qvla.spec import Recipe, read_recipe


def variants() -> Iterator[Recipe]:
    """The three recipes, and one-line changes of the paper's and of ours."""
    naive, paper, ours = (read_recipe(name) for name in ("rtn-w4a4", "omega-qvla", "omega-int4"))
    yield from (naive, paper, ours)
    yield changed(
        naive,
        "rtn-w4a4: groups of 64",
        weight={"group_size": 64},
        activation={"granularity": "token_group", "group_size": 64},
    )
    yield changed(paper, "omega-qvla: one transform per site", transform={"sharing": "site"})
    for rotation in ("none", "svd", "hadamard"):
        yield changed(paper, f"omega-qvla: rotation {rotation}", transform={"rotation": rotation})
    yield changed(paper, "omega-qvla: one scale for all steps", ("action",), activation={"mode": "static"})
    yield changed(paper, "omega-qvla: GPTQ on both", ("action",), weight={"rounding": "gptq"})
    yield changed(paper, "omega-qvla: RTN on both", ("language",), weight={"rounding": "rtn"})
    for rotation in ("none", "svd", "svd_hadamard"):
        yield changed(ours, f"omega-int4: rotation {rotation}", transform={"rotation": rotation})
    yield changed(ours, "omega-int4: no smoothing", transform={"smoothing": None})
    yield changed(ours, "omega-int4: no smoothing, SVD·H", transform={"smoothing": None, "rotation": "svd_hadamard"})
    yield changed(ours, "omega-int4: no permutation", transform={"permutation": "none"})
    yield changed(ours, "omega-int4: RTN on both", weight={"rounding": "rtn"})
    yield changed(ours, "omega-int4: GPTQ on both", weight={"rounding": "gptq"})
    yield changed(ours, "omega-int4: peak scales", weight={"scale_search": "max"})
    yield changed(
        ours,
        "omega-int4: one scale per token, groups for weights",
        activation={"granularity": "token", "group_size": None},
    )
    yield changed(
        ours,
        "omega-int4: one scale per token and output channel",
        weight={"group_size": None},
        activation={"granularity": "token", "group_size": None},
    )
    per_step = {"granularity": "tensor", "mode": "per_step", "group_size": None}
    yield changed(
        ours,
        "omega-int4: folded d[j] and a[t] on action",
        ("action",),
        transform={"folded_percentile": 99.9},
        activation=per_step,
    )


def measure(checkpoint: Path) -> list[dict[str, Any]]:
    bench = Bench(checkpoint)
    rows = []
    for recipe in variants():
        errors = bench.errors(recipe)
        rows.append(
            {
                "variant": recipe.name,
                "execution": recipe.execution,
                "action_nmse": errors.actions.normalized_mse,
                "action_mse": errors.actions.mse,
                "layer_nmse": errors.layers,
            }
        )
        print(f"{recipe.name}: action nMSE {errors.actions.normalized_mse:.4f}", flush=True)
    return rows


def markdown(results: dict[str, list[dict[str, Any]]]) -> str:
    """Action errors of both policies side by side, then the layer errors of each."""
    lines = ["| variant | execution | " + " | ".join(f"action nMSE, {name}" for name in results) + " |"]
    lines.append("|---|---|" + "---|" * len(results))
    for rows in zip(*results.values(), strict=True):
        figures = " | ".join(f"{row['action_nmse']:.4f}" for row in rows)
        lines.append(f"| {rows[0]['variant']} | {rows[0]['execution']} | {figures} |")
    for name, rows in results.items():
        kinds = list(rows[0]["layer_nmse"])
        lines += ["", f"Output error of layers (normalized MSE), {name}:", ""]
        lines += ["| variant | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
        for row in rows:
            figures = " | ".join(f"{row['layer_nmse'][kind]:.4f}" for kind in kinds)
            lines.append(f"| {row['variant']} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/headline"), help="of headline.py; holds the twin")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that the figures do not depend on the machine's cores
    sources = {"policy": api.bundled_checkpoint(), "twin": options.work / "twin-full-precision"}
    results = {name: measure(source) for name, source in sources.items()}
    write_text(options.out / "ablation.json", json.dumps(results, indent=1) + "\n")
    write_text(options.out / "ablation.md", markdown(results))


if __name__ == "__main__":
    main()
