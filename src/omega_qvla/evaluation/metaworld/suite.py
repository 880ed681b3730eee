"""Tasks of Meta-World as a benchmark."""

from __future__ import annotations

from pathlib import Path

from omega_qvla.evaluation.benchmark import Benchmark
from omega_qvla.evaluation.rollout import Environment
from omega_qvla.evaluation.seeds import METAWORLD_PARTITION

OWN, LEROBOT = "omega-qvla", "lerobot"
"""Profiles: ours, and that of `lerobot-eval --env.type=metaworld` of lerobot 0.6.1."""
MT10, MT50 = "mt10", "mt50"
SUITES = {OWN: (MT10,), LEROBOT: ("easy", "medium", "hard", "very_hard", MT10, MT50)}
"""Profile to its sets of tasks: lerobot's groups by difficulty, and Meta-World's own two."""
MAX_STEPS = 220
"""Step limit of an episode under our profile; the scripted experts need 81 steps on average and 165 at most."""
CALIBRATION_OBSERVATIONS = 256
RECORDED_ACTIONS = 8
"""An inference is recorded after so many at least."""


def metaworld_suite(suite: str | None = None, profile: str | Path | None = None) -> Benchmark:
    """The benchmark of a suite under a profile: MT10 under ours unless they say something else.

    Raises `ValueError` for an unknown name or a suite that the profile does not have, and `ImportError` that says
    what to install.
    """
    chosen = OWN if profile is None else str(profile)
    if chosen not in SUITES:
        raise ValueError(
            f"Meta-World's profiles are {' and '.join(SUITES)} (found {chosen}); for LIBERO's add --env libero"
        )
    if suite not in SUITES[chosen] and (suite, chosen) != (None, OWN):
        raise ValueError(
            f"Meta-World's suites are {', '.join(SUITES[LEROBOT])} with --profile lerobot, {MT10} without it: choose "
            f"one with --suite (found {suite}); for LIBERO's add --env libero"
        )
    return metaworld_mt10() if chosen == OWN or suite is None else _as_lerobot_shows_it(suite)


def metaworld_mt10() -> Benchmark:
    """MT10 with our two cameras. Raises `ImportError` that says what to install."""
    from omega_qvla.evaluation.metaworld.task import TASKS

    return Benchmark("MT10", TASKS, metaworld_environment, MAX_STEPS, METAWORLD_PARTITION)


def metaworld_environment(task: str) -> Environment:
    """A task of MT10 with our cameras; the simulator is imported here, so that only those who run it need it."""
    from omega_qvla.evaluation.metaworld.task import MetaWorldTask

    return MetaWorldTask(task)


def lerobot_environment(task: str) -> Environment:
    """A task in lerobot's environment, which is imported here for the same reason."""
    from omega_qvla.evaluation.metaworld.lerobot_task import LerobotMetaWorldTask

    return LerobotMetaWorldTask(task)


def _as_lerobot_shows_it(suite: str) -> Benchmark:
    from omega_qvla.evaluation.metaworld import lerobot_task, task

    groups = lerobot_task.GROUPS | {MT10: list(task.TASKS), MT50: list(lerobot_task.TASKS)}
    return Benchmark(
        name=f"Meta-World {suite}",
        tasks={name: lerobot_task.TASKS[name] for name in groups[suite]},
        factory=lerobot_environment,
        max_steps=lerobot_task.MAX_STEPS,
        partition=METAWORLD_PARTITION,
        record_actions=RECORDED_ACTIONS,
        calibration_observations=CALIBRATION_OBSERVATIONS,
        conditions={
            "suite": suite,
            "profile": LEROBOT,
            "camera": lerobot_task.MODEL_CAMERA,
            "camera size": lerobot_task.IMAGE_SIZE,
        },
    )
