"""Success and action error against width: W4A4, W3A3, W2A4 for every recipe, on policy and twin.

    python benchmarks/widths.py --out docs/results --episodes 2

W4A4 is the headline evaluation; the narrower widths are run here, with full precision in the same call. Writes
`widths.json` with every episode's outcome and `widths.svg`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from measure import changed

from omega_qvla import api
from omega_qvla.cli import DEMO_RECIPES
from omega_qvla.evaluation import results as results_file
from omega_qvla.evaluation.metaworld import TASKS
from omega_qvla.evaluation.results import Evaluation, write_text
from omega_qvla.evaluation.run import Candidate, evaluate_policies
from omega_qvla.policy import Policy
from omega_qvla.spec import read_recipe

WIDTHS = ((4, 4), (3, 3), (2, 4))
HEADLINE = {"policy": "policy.json", "outlier-matched twin": "twin.json"}
"""Files of headline.py, by the name of the plot's column."""


def _load(path: Path, label: str) -> Policy:
    policy = api.load(path, "simulated")
    policy.label = label
    return policy


def sweep(source: Path, work: Path, episodes: int) -> Evaluation:
    """Full precision and every recipe at every width below W4A4, on the same episodes.

    The integer and the simulated execution of these recipes are the same function; simulation is faster here.
    """
    calibration = api.calibrate_on_rollouts(api.load(source))
    candidates = [Candidate(partial(_load, source, "full precision"), source)]
    for name in DEMO_RECIPES:
        for weight, activation in WIDTHS[1:]:
            label = f"{name} W{weight}A{activation}"
            out = work / label.replace(" ", "-")
            if not out.exists():
                recipe = changed(read_recipe(name), label, weight={"bits": weight}, activation={"bits": activation})
                api.quantize(source, recipe, out, calibration=calibration)
            candidates.append(Candidate(partial(_load, out, label), out))
    return evaluate_policies(candidates, tasks=list(TASKS), episodes_per_task=episodes, workers=2, latency_repeats=0)


def points(evaluation: Evaluation, suffix: str = "") -> list[dict[str, Any]]:
    """One record per policy: success with its interval, action error, every episode."""
    return [
        {
            "label": policy.label + (suffix if policy.fidelity is not None else ""),
            "successes": policy.success().successes,
            "episodes": policy.success().episodes,
            "interval": [policy.success().low, policy.success().high],
            "action_nmse": None if policy.fidelity is None else policy.fidelity.normalized_mse,
            "outcomes": [[e.task, e.seed, e.success, e.steps] for e in policy.episodes],
        }
        for policy in evaluation.policies
    ]


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Success above, action error below; policy left, twin right."""
    figure, axes = plt.subplots(2, len(results), figsize=(9, 6), sharex=True, sharey="row", squeeze=False)
    labels = [f"W{weight}A{activation}" for weight, activation in WIDTHS]
    for column, (name, records) in enumerate(results.items()):
        found = {record["label"]: record for record in records}
        full = found["full precision"]
        axes[0][column].axhline(full["successes"] / full["episodes"], color="0.4", ls="--", label="full precision")
        for recipe in DEMO_RECIPES:
            rows = [found[f"{recipe} {label}"] for label in labels]
            rates = [row["successes"] / row["episodes"] for row in rows]
            low = [max(0.0, rate - row["interval"][0]) for rate, row in zip(rates, rows, strict=True)]
            high = [max(0.0, row["interval"][1] - rate) for rate, row in zip(rates, rows, strict=True)]
            axes[0][column].errorbar(labels, rates, yerr=[low, high], marker="o", capsize=3, label=recipe)
            axes[1][column].plot(labels, [row["action_nmse"] for row in rows], marker="o", label=recipe)
        axes[0][column].set_title(name)
        axes[1][column].set_yscale("log")
    axes[0][0].set_ylabel("success rate, Wilson 95 %")
    axes[1][0].set_ylabel("action error (normalized MSE)")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/headline"), help="of headline.py; holds the twin")
    parser.add_argument("--episodes", type=int, default=2)
    options = parser.parse_args()
    sources = {
        "policy": api.bundled_checkpoint(),
        "outlier-matched twin": options.work / "twin-full-precision",
    }
    results = {}
    for name, source in sources.items():
        headline = points(results_file.load(options.out / HEADLINE[name]), " W4A4")
        narrow = points(sweep(source, options.work / "widths" / source.name, options.episodes))
        results[name] = [*headline, *(record for record in narrow if record["action_nmse"] is not None)]
        results[name].append({**narrow[0], "label": "full precision, run with the narrower widths"})
    write_text(options.out / "widths.json", json.dumps(results, indent=1) + "\n")
    plot(results, options.out / "widths.svg")


if __name__ == "__main__":
    main()
