"""A suite of LIBERO under a profile, as a benchmark."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omega_qvla.evaluation.benchmark import Benchmark
from omega_qvla.evaluation.libero.installation import check_installation, prepare_import
from omega_qvla.evaluation.libero.profile import SUITES, Profile, Suite, profile_names, read_profile
from omega_qvla.evaluation.rollout import Environment

CALIBRATION_OBSERVATIONS = 256
"""Of ten trajectories, which have several hundred."""
RECORDED_ACTIONS = 8
"""An inference is recorded after so many at least."""


def libero_suite(suite: str | None, profile: str | Path | None) -> Benchmark:
    """The benchmark of a suite (`spatial`, `object`, `goal`, `long`) under a profile's name or TOML file.

    A task is called after its suite and number, such as `libero_spatial/3`, and a seed is the number of an initial
    state. Raises `ValueError` for an unknown or missing name, `ProfileError` for a profile that cannot be read, and
    `LiberoError` if LIBERO or its assets are not installed.
    """
    if suite not in SUITES:
        raise ValueError(f"LIBERO's suites are {', '.join(SUITES)}: choose one with --suite (found {suite})")
    if profile is None:
        raise ValueError(
            "step limits, waiting and replanning differ between harnesses, and the score with them: choose one with "
            f"--profile {'|'.join(profile_names())}|FILE.toml"
        )
    chosen = read_profile(profile)
    check_installation()
    return benchmark_of(suite, chosen)


def benchmark_of(suite: Suite, profile: Profile) -> Benchmark:
    """The same, of which only LIBERO's list of tasks has to be installed."""
    return Benchmark(
        name=f"LIBERO {suite}",
        tasks=instructions(suite),
        factory=LiberoFactory(profile),
        max_steps=profile.step_limit(suite),
        partition=profile.initial_states.partition(),
        states_are_few=True,
        execute_steps=profile.replan_interval,
        record_actions=RECORDED_ACTIONS,
        calibration_observations=CALIBRATION_OBSERVATIONS,
        gripper_threshold=0.5 if profile.gripper == "open_is_one" else 0.0,
        conditions={
            "suite": SUITES[suite],
            "profile": profile.name,
            "waiting steps before each episode": profile.wait_steps,
            "camera size": profile.camera_size,
            "image size": profile.image_size or profile.camera_size,
            "image rotation": profile.image_rotation,
            "state": profile.state,
            "gripper": profile.gripper,
            "simulator seed": f"{profile.simulator_seed}{' + initial state' if profile.seed_counts_states else ''}",
            "initial states for calibration": " to ".join(map(str, profile.initial_states.calibration)),
        },
    )


def instructions(suite: Suite) -> dict[str, str]:
    """Task to the sentence that LIBERO gives for it, in LIBERO's order."""
    tasks = open_suite(SUITES[suite]).tasks
    return {f"{SUITES[suite]}/{number}": task.language for number, task in enumerate(tasks)}


def open_suite(name: str) -> Any:
    """LIBERO's own object for a suite. Raises `LiberoError` if it is not installed."""
    prepare_import()
    from libero.libero import benchmark

    with redirect_stdout(io.StringIO()):  # it prints the order of its tasks
        return benchmark.get_benchmark_dict()[name]()


@dataclass(frozen=True)
class LiberoFactory:
    """Task name to a new environment."""

    profile: Profile

    def __call__(self, task: str) -> Environment:
        """Imports the simulator, so that only those who run it need it installed."""
        from omega_qvla.evaluation.libero.task import LiberoTask

        suite, number = task.split("/")
        return LiberoTask(open_suite(suite), int(number), self.profile)
