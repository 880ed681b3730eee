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
from omega_qvla.evaluation.metaworld.suite import MAX_STEPS, metaworld_environment
from omega_qvla.evaluation.rollout import EnvironmentPool, run_block

pytestmark = pytest.mark.slow

SEEDS = (0, 1)


def by_lerobot(out: Path, task: str, *options: str) -> list[bool]:
    """Success by seed."""
    arguments = [
        str(Path(sys.executable).with_name("lerobot-eval")),
        "--env.type=omega_qvla_metaworld",
        f"--env.task={task}",
        f"--eval.n_episodes={len(SEEDS)}",
        f"--eval.batch_size={len(SEEDS)}",
        f"--seed={SEEDS[0]}",
        f"--output_dir={out}",
        *options,
    ]
    finished = subprocess.run(arguments, cwd=out.parent, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    (only,) = json.loads((out / "eval_info.json").read_text())["per_task"]
    assert only["task_group"] == task
    solved: list[bool] = only["metrics"]["successes"]
    return solved


def by_us(directory: Path, task: str) -> list[bool]:
    pool = EnvironmentPool(metaworld_environment)
    policy, named = api.load(directory), [(task, seed) for seed in SEEDS]
    episodes = run_block(policy, named, pool, lanes=len(SEEDS), max_steps=MAX_STEPS)
    pool.close()
    return [episode.success for episode in episodes]


def test_full_precision(tmp_path: Path) -> None:
    task, checkpoint = "drawer-close-v3", api.bundled_checkpoint()
    options = ["--policy.type=omega_qvla", f"--policy.checkpoint={checkpoint}", "--eval.use_async_envs=false"]
    assert by_lerobot(tmp_path / "out", task, *options) == by_us(checkpoint, task)


def test_quantized(tmp_path: Path) -> None:
    """With robots in processes of their own, as lerobot has them by default."""
    task, directory = "button-press-topdown-v3", tmp_path / "rtn"
    api.quantize(api.bundled_checkpoint(), "rtn", directory)
    assert by_lerobot(tmp_path / "out", task, f"--policy.path={directory}") == by_us(directory, task)
