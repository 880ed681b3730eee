"""The headline evaluation: the bundled policy and its outlier-matched twin, full precision and three recipes.

    python training/plant_outliers.py --out runs/headline/twin-full-precision
    python benchmarks/headline.py --out docs/results --episodes 20

Writes `policy.json` and `twin.json` with every episode, and a Markdown and HTML report of each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omega_qvla import api
from omega_qvla.cli import DEMO_RECIPES
from omega_qvla.evaluation.report import table, write_report
from omega_qvla.evaluation.results import save


def judge(source: Path, work: Path, out: Path, name: str, episodes: int) -> None:
    """Quantize `source` with every recipe and evaluate all on the same episodes."""
    calibration = api.calibrate_on_rollouts(api.load(source))
    for recipe in DEMO_RECIPES:
        if not (work / recipe).exists():
            api.quantize(source, recipe, work / recipe, calibration=calibration)
    evaluation = api.evaluate([source, *(work / recipe for recipe in DEMO_RECIPES)], episodes_per_task=episodes)
    save(evaluation, out / f"{name}.json")
    write_report(evaluation, out / name)
    print(table(evaluation))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/headline"))
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--only", choices=("policy", "twin"), help="evaluate one of the two")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only != "twin":
        judge(api.bundled_checkpoint(), options.work / "policy", options.out, "policy", options.episodes)
    if options.only != "policy":
        twin = options.work / "twin-full-precision"
        if not twin.exists():
            raise SystemExit(f"make the twin first: python training/plant_outliers.py --out {twin}")
        judge(twin, options.work / "twin", options.out, "twin", options.episodes)


if __name__ == "__main__":
    main()
