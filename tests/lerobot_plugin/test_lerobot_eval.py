"""The real `lerobot-eval`: a policy solves there what it solves in our evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("metaworld") is None:
    pytest.skip("needs Meta-World", allow_module_level=True)

from omega_qvla import api
from omega_qvla.evaluation.rollout import EnvironmentPool, metaworld_environment, run_block

pytestmark = pytest.mark.slow

TASKS, SEEDS = ("button-press-topdown-v3", "drawer-close-v3"), (0, 1)


def by_lerobot(out: Path, *options: str) -> dict[tuple[str, int], bool]:
    """Success by task and seed."""
    arguments = [
        str(Path(sys.executable).with_name("lerobot-eval")),
        "--env.type=omega_qvla_metaworld",
        f"--env.task={','.join(TASKS)}",
        f"--eval.n_episodes={len(SEEDS)}",
        f"--eval.batch_size={len(SEEDS)}",
        f"--seed={SEEDS[0]}",
        f"--output_dir={out}",
        *options,
    ]
    finished = subprocess.run(arguments, cwd=out.parent, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    per_task = json.loads((out / "eval_info.json").read_text())["per_task"]
    return {
        (entry["task_group"], seed): success
        for entry in per_task
        for seed, success in zip(SEEDS, entry["metrics"]["successes"], strict=True)
    }


def by_us(directory: Path) -> dict[tuple[str, int], bool]:
    pool = EnvironmentPool(metaworld_environment)
    policy, solved = api.load(directory), {}
    for task in TASKS:
        episodes = run_block(policy, [(task, seed) for seed in SEEDS], pool, lanes=len(SEEDS))
        solved |= {(task, episode.seed): episode.success for episode in episodes}
    pool.close()
    return solved


def test_full_precision(tmp_path: Path) -> None:
    checkpoint = api.bundled_checkpoint()
    options = ["--policy.type=omega_qvla", f"--policy.checkpoint={checkpoint}", "--eval.use_async_envs=false"]
    assert by_lerobot(tmp_path / "out", *options) == by_us(checkpoint)


def test_quantized(tmp_path: Path) -> None:
    """With robots in processes of their own, as lerobot has them by default."""
    directory = tmp_path / "rtn"
    api.quantize(api.bundled_checkpoint(), "rtn", directory)
    assert by_lerobot(tmp_path / "out", f"--policy.path={directory}") == by_us(directory)
