"""Make the outlier-matched twin of a checkpoint; see `omega_qvla.studies.twin`.

python training/plant_outliers.py --checkpoint src/omega_qvla/bundled/compact-pi05 --out runs/twin
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omega_qvla import api
from omega_qvla.studies.twin import make_twin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=api.bundled_checkpoint())
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    print("channel max / median before and after:")
    for name, (before, after) in make_twin(options.checkpoint, options.out).items():
        print(f"  {name}: {before:.1f} -> {after:.1f}")


if __name__ == "__main__":
    main()
