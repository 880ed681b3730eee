"""Makes the golden checkpoint and its actions. It must load for ever: run this for a new format version only.

python tests/golden/make.py
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from omega_qvla import api  # noqa: E402
from omega_qvla.policy import Observation  # noqa: E402
from tiny_policy import ACTION_DIM, CAMERAS, CHUNK, STATE_DIM, Size, initialize, random_observations, save  # noqa: E402

RECIPE = "omega-int4"
SIZE = Size(width=64, depth=1, image=16, patch=8)


def ramp_observation() -> Observation:
    """Pictures and states from arithmetic alone: no random generator has to stay as it is."""
    pixels = np.arange(2 * 16 * 16 * 3).reshape(2, 16, 16, 3)
    images = {camera: (pixels * (i + 3) % 256).astype(np.uint8) for i, camera in enumerate(CAMERAS)}
    state = (np.arange(2 * STATE_DIM).reshape(2, STATE_DIM) / 4 - 1).astype(np.float32)
    return Observation(images, state, ("open the door", "push the puck"))


def ramp_noise() -> torch.Tensor:
    count = 2 * CHUNK * (ACTION_DIM + 2)
    return (torch.arange(count, dtype=torch.float32) * 0.37 % 2 - 1).view(2, CHUNK, ACTION_DIM + 2)


def main() -> None:
    torch.set_num_threads(1)
    out = HERE / RECIPE
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "golden"
        save(initialize(SIZE, seed=0), SIZE, source)
        observations = random_observations(8, seed=0, image=SIZE.image)
        api.quantize(source, RECIPE, out, calibration=api.CalibrationSet(observations, ("random:0",)))
    actions = api.load(out).infer(ramp_observation(), ramp_noise())
    (HERE / "expected.json").write_text(json.dumps({"actions": actions.tolist()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
