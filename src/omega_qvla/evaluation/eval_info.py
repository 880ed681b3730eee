"""`eval_info.json` in the layout of `lerobot-eval`, one per policy, so that what reads its results reads ours.

lerobot numbers the tasks of a group, which is LIBERO's suite or a single task of Meta-World, and keeps rewards; ours
are 1 at success and 0 otherwise, as in the environment that our plug-in gives to lerobot. What lerobot does not know,
the comparison with the reference on the same episodes, stands under a key of its own. Times of single policies are
null: policies take turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omega_qvla.evaluation.results import Evaluation, PolicyResult, write_text
from omega_qvla.evaluation.rollout import Episode

OWN_KEY = "omega_qvla"
EVAL_INFO_FILE = "eval_info.json"
_NO_VIDEOS: dict[str, list[str]] = {"video_paths": [], "predicted_video_paths": []}


def write_eval_info(evaluation: Evaluation, directory: Path) -> list[Path]:
    """Write `<directory>/<policy>/eval_info.json` for every policy; returns their paths.

    Raises `ValueError` if two policies' names are the same as names of directories; then nothing is written.
    """
    paths = [directory / _directory_name(policy.label) / EVAL_INFO_FILE for policy in evaluation.policies]
    if len(set(paths)) != len(paths):
        names = ", ".join(repr(policy.label) for policy in evaluation.policies)
        raise ValueError(f"policies {names} have the same name as directories; give them others")
    for policy, path in zip(evaluation.policies, paths, strict=True):
        write_text(path, json.dumps(eval_info(evaluation, policy), indent=2, allow_nan=False))
    return paths


def eval_info(evaluation: Evaluation, policy: PolicyResult) -> dict[str, Any]:
    """What lerobot would write about one policy, and how it compares with the reference."""
    per_task, groups = [], dict[str, list[Episode]]()
    for task in evaluation.tasks:
        group, number = _group_and_number(task)
        episodes = [episode for episode in policy.episodes if episode.task == task]
        per_task.append({"task_group": group, "task_id": number, "metrics": _metrics(episodes)})
        groups.setdefault(group, []).extend(episodes)
    return {
        "per_task": per_task,
        "per_group": {group: _aggregate(episodes) for group, episodes in groups.items()},
        "overall": _aggregate(policy.episodes) | {"eval_s": None, "eval_ep_s": None},
        OWN_KEY: _own(evaluation, policy),
    }


def _group_and_number(task: str) -> tuple[str, int]:
    """LIBERO's tasks are called after their suite and number, such as `libero_goal/3`."""
    group, _, number = task.rpartition("/")
    return (group, int(number)) if group and number.isdecimal() else (task, 0)


def _metrics(episodes: Sequence[Episode]) -> dict[str, Any]:
    rewards = [float(episode.success) for episode in episodes]
    successes = [episode.success for episode in episodes]
    return {"sum_rewards": rewards, "max_rewards": rewards, "successes": successes} | _NO_VIDEOS


def _aggregate(episodes: Sequence[Episode]) -> dict[str, Any]:
    share = sum(episode.success for episode in episodes) / len(episodes)
    figures = {"avg_sum_reward": share, "avg_max_reward": share, "pc_success": 100 * share}
    return figures | {"n_episodes": len(episodes)} | _NO_VIDEOS


def _own(evaluation: Evaluation, policy: PolicyResult) -> dict[str, Any]:
    reference = evaluation.reference()
    tasks = (None, *evaluation.tasks)
    paired = {task or "overall": asdict(evaluation.paired(policy, task)) for task in tasks}
    return {
        "policy": policy.label,
        "execution": policy.execution,
        "reference": reference.label,
        "benchmark": evaluation.benchmark,
        "conditions": evaluation.conditions,
        "seeds": list(evaluation.seeds),
        "max_steps": evaluation.max_steps,
        "execute_steps": policy.execute_steps,
        "steps": {task: [each.steps for each in policy.episodes if each.task == task] for task in evaluation.tasks},
        "success": {task or "overall": asdict(policy.success(task)) for task in tasks},
        "paired_with_reference": None if policy is reference else paired,
        "machine": asdict(evaluation.machine),
    }


def _directory_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label)
