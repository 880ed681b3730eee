"""The command that is run before a robot moves: its verdict, its exit code, and where observations come from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset

from omega_qvla import api
from omega_qvla.evaluation.benchmark import Benchmark
from omega_qvla.evaluation.recording import consecutive, spread_pairs
from omega_qvla.evaluation.seeds import METAWORLD_PARTITION
from omega_qvla.gate import check
from omega_qvla.gate.observing import EPISODES_PER_TASK, from_dataset, from_rollouts
from omega_qvla.pack.checkpoint import read_manifest
from omega_qvla.spec import Recipe, Rule, read_recipe, with_settings
from tiny_policy import CAMERAS, INSTRUCTIONS, STATE_DIM

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from line_world import Servo, make_line

Run = Callable[..., tuple[int, str, str]]
EPISODES, LENGTH = 3, 9
ALL_KEPT = Recipe(
    "kept", "Nothing is quantized.", tuple(Rule(p, keep="test") for p in ("language", "action", "vision"))
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets") / "recorded"
    picture = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
    features: dict[str, Any] = {f"observation.images.{camera}": picture for camera in CAMERAS}
    features["observation.state"] = {"dtype": "float32", "shape": (STATE_DIM,), "names": None}
    features["action"] = {"dtype": "float32", "shape": (2,), "names": None}
    recorded = LeRobotDataset.create("tests/recorded", fps=10, features=features, root=root, use_videos=False)
    generator = np.random.default_rng(0)
    for episode in range(EPISODES):
        for _ in range(LENGTH):
            frame: dict[str, Any] = {
                f"observation.images.{camera}": generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                for camera in CAMERAS
            }
            frame["observation.state"] = generator.uniform(-1, 1, STATE_DIM).astype(np.float32)
            recorded.add_frame(frame | {"action": np.zeros(2, np.float32), "task": INSTRUCTIONS[episode]})
        recorded.save_episode()
    recorded.finalize()
    return root


@pytest.fixture(scope="module")
def kept(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which everything stays in floating point: the same policy bit by bit."""
    out = tmp_path_factory.mktemp("kept") / "kept"
    api.quantize(checkpoint, ALL_KEPT, out)
    return out


def test_the_same_policy_passes(kept: Path, checkpoint: Path, dataset: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "gate.json"
    arguments = ("--against", checkpoint, "--dataset", dataset, "--observations", 8, "--json", file)
    code, output, _ = run("check", kept, *arguments)
    assert code == 0 and "the gate passes" in output and "FAIL" not in output
    document = json.loads(file.read_text())
    assert document["passed"] and document["held_out"] and document["observations"] == 8
    assert all(each["value"] == 0 for each in document["checks"] if each["measure"].startswith("error"))
    assert document["limits"]["error_p95"] == 0.33 and document["machine"]["cpu"]


def test_a_gate_that_fails_exits_with_one(
    quantized: Callable[[str], Path], checkpoint: Path, dataset: Path, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "gate.json"
    strict = ("--set", "gate.error_p50=0", "--set", "gate.resolution=1e-9")
    arguments = ("--against", checkpoint, "--dataset", dataset, "--observations", 8, "--json", file)
    code, output, _ = run("check", quantized("rtn"), *arguments, *strict)
    assert code == 1 and "FAIL" in output and "the gate fails" in output
    document = json.loads(file.read_text())
    assert not document["passed"]
    for each in document["checks"]:
        assert each["passed"] == (each["value"] <= each["limit"])
    assert all(each["limit"] < 1e-6 for each in document["checks"] if each["measure"] == "error p50")


def test_limits_are_the_recipes(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    recipe = with_settings(ALL_KEPT, ["gate.jerk=3.5"])
    api.quantize(checkpoint, recipe, tmp_path / "own")
    assert read_manifest(tmp_path / "own").plan.recipe == recipe
    report = check(tmp_path / "own", checkpoint, dataset=dataset, observations=4)
    assert report.limits.jerk == 3.5 and report.limits.error_p95 == 0.33


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--against", "{quantized}"), "is quantized itself"),
        (("--against", "{elsewhere}"), "was not made from"),
        (("--against", "{checkpoint}", "--set", "weight.bits=8"), "no setting of the gate"),
        (("--against", "{checkpoint}", "--set", "gate.jerk=-1"), "gate.jerk"),
        (("--against", "{checkpoint}", "--dataset", "{elsewhere}"), "holds no lerobot dataset"),
        (("--against", "{checkpoint}", "--dataset", "{dataset}", "--env", "libero"), "leave out --dataset"),
        (("--against", "{checkpoint}", "--dataset", "{dataset}", "--gripper", "hand"), "no dimension"),
        (("--against", "{checkpoint}", "--dataset", "{dataset}", "--gripper", "9"), "cannot be dimension 9"),
    ],
)
def test_what_cannot_be_checked_exits_with_two(
    arguments: tuple[str, ...],
    reason: str,
    quantized: Callable[[str], Path],
    checkpoint: Path,
    dataset: Path,
    run: Run,
    tmp_path: Path,
) -> None:
    places = {"quantized": quantized("rtn"), "checkpoint": checkpoint, "dataset": dataset, "elsewhere": tmp_path}
    given = [argument.format(**places) for argument in arguments]
    code, _, errors = run("check", quantized("rtn"), *given, "--json", tmp_path / "gate.json")
    assert code == 2 and reason in errors and "Traceback" not in errors
    assert not (tmp_path / "gate.json").exists()


def test_episodes_of_calibration_are_left_out_or_said(dataset: Path) -> None:
    seen = ("recorded:episode 0", "recorded:episode 2")
    observed = from_dataset(dataset, 100, 2, seen)
    assert observed.held_out and {item.seed for item in observed.recorded} == {1}
    every = tuple(f"recorded:episode {episode}" for episode in range(EPISODES))
    observed = from_dataset(dataset, 100, 2, every)
    assert not observed.held_out and {item.seed for item in observed.recorded} == {0, 1, 2}


def test_pairs_of_a_dataset_follow_one_another(dataset: Path) -> None:
    observed = from_dataset(dataset, 8, 4, ())
    assert len(consecutive(observed.recorded)) >= 4
    assert {item.inference for item in observed.recorded} == {0, 1, 2}  # frames 0, 4 and 8 of 9
    with pytest.raises(ValueError, match="longer than 9 frames"):
        from_dataset(dataset, 8, 9, ())


def test_rollouts_are_of_states_kept_for_this() -> None:
    benchmark = Benchmark("lines", {"slide": "slide", "lift": "lift"}, make_line, 30, METAWORLD_PARTITION)
    observed = from_rollouts(Servo(), 12, benchmark, ("slide:500000",))
    assert observed.held_out and 1 < len(observed.recorded) <= 12
    assert {item.seed for item in observed.recorded} <= set(METAWORLD_PARTITION.held_out)
    assert len({item.seed for item in observed.recorded}) == EPISODES_PER_TASK
    assert len(consecutive(observed.recorded)) >= len(observed.recorded) // 2
    first = METAWORLD_PARTITION.held_out.start
    assert not from_rollouts(Servo(), 12, benchmark, (f"lift:{first}",)).held_out


def test_other_draws_are_other_noise_for_the_same_observation() -> None:
    benchmark = Benchmark("lines", {"slide": "slide"}, make_line, 30, METAWORLD_PARTITION)
    recorded = spread_pairs(from_rollouts(Servo(), 8, benchmark, ()).recorded, 4)
    draws = [[replace(item, draw=draw).noise((4, 3)).numpy() for draw in (0, 1, 2)] for item in recorded]
    flat = [noise.tobytes() for draw in draws for noise in draw]
    assert len(set(flat)) == len(flat)
    assert all(
        np.array_equal(item.noise((4, 3)).numpy(), draw[0]) for item, draw in zip(recorded, draws, strict=True)
    )


def test_a_recipe_file_has_a_gate(tmp_path: Path) -> None:
    text = (Path(api.__file__).parent / "recipes" / "rtn.toml").read_text()
    (tmp_path / "mine.toml").write_text(f"{text}\n[gate]\nerror_p95 = 0.25\n")
    gate = read_recipe(tmp_path / "mine.toml").gate
    assert gate is not None and gate.error_p95 == 0.25 and gate.error_p50 == 0.33
    assert read_recipe("rtn").gate is None
