"""Profiles of LIBERO, its suites in the real package, and what is said where it is not ready."""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from omega_qvla import api, cli
from omega_qvla.evaluation.libero import LiberoError, installation, libero_suite
from omega_qvla.evaluation.libero.profile import SUITES, ProfileError, Suite, profile_names, read_profile
from omega_qvla.evaluation.libero.suite import benchmark_of, instructions, open_suite

PROFILES = Path(import_module("omega_qvla.evaluation.libero").__path__[0]) / "profiles"
LIMITS = {"openpi": (220, 280, 300, 520), "lerobot": (280, 280, 300, 520), "omega-qvla": (220, 280, 600, 1000)}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What LIBERO's import is told stays in the test."""
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")
    monkeypatch.delenv("LIBERO_CONFIG_PATH")


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home directory where nothing is, and nobody who would answer."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(builtins, "input", lambda *prompt: pytest.fail("it asks"))
    return tmp_path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All packages, LIBERO's being an empty one; its directory."""
    package = tmp_path_factory.mktemp("site") / "libero"
    for folder in ("bddl_files", "init_files"):
        (package / "libero" / folder).mkdir(parents=True)
    spec = ModuleSpec("libero", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(installation, "find_spec", lambda name: spec)
    return package / "libero"


def test_there_is_a_profile_per_harness() -> None:
    assert set(profile_names()) == set(LIMITS)


@pytest.mark.parametrize("name", LIMITS)
def test_what_profiles_say(name: str) -> None:
    profile = read_profile(name)
    assert profile.name == name
    assert tuple(vars(profile.max_steps).values()) == LIMITS[name]
    for suite in SUITES:  # LIBERO's own end comes first where it would
        limit = vars(profile.max_steps)[suite]
        assert profile.step_limit(suite) == (990 if limit == 1000 else limit)


@pytest.mark.parametrize("name", LIMITS)
def test_no_initial_state_is_for_two_uses(name: str) -> None:
    uses = vars(read_profile(name).initial_states.partition()).values()
    states = [state for use in uses for state in use]
    assert sorted(states) == list(range(50))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("held_out = [40, 41]", "held_out = [39, 41]", "seed 39 is used for both evaluation and held_out"),
        ("calibration = [42, 49]", "calibration = [42, 50]", "initial_states.calibration.1: .*less than 50"),
        ("calibration = [42, 49]", "", "initial_states.calibration: Field required"),
        ("wait_steps = 10", "wait = 10", "wait"),
        ("image_rotation = 180", "image_rotation = 90", "image_rotation: Input should be 0 or 180"),
        (", long = 520", "", "max_steps.long: Field required"),
        ('"eef_position, axis_angle, gripper_fingers"', '"joints"', "state: Input should be"),
        ("wait_steps = 10", "wait_steps = 1O", "mine.toml: "),
    ],
)
def test_a_profile_of_ones_own(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = (PROFILES / "openpi.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text)
    assert read_profile(tmp_path / "mine.toml") == read_profile("openpi")
    (tmp_path / "mine.toml").write_text(text.replace(old, new))
    with pytest.raises(ProfileError, match=message):
        read_profile(tmp_path / "mine.toml")


def test_profiles_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="there is no profile 'mine'; there are lerobot, omega-qvla, openpi"):
        read_profile("mine")
    with pytest.raises(ProfileError, match="there is no profile file"):
        read_profile(tmp_path / "mine.toml")


@pytest.mark.parametrize("suite", SUITES)
def test_the_suites_of_the_real_package(suite: Suite, home: Path) -> None:
    pytest.importorskip("libero", reason="LIBERO's task definitions are not installed (hf-libero)")
    tasks = instructions(suite)
    assert list(tasks) == [f"{SUITES[suite]}/{number}" for number in range(10)]
    real = open_suite(SUITES[suite])
    assert list(tasks.values()) == [real.get_task(number).language for number in range(10)]
    assert all(sentence == sentence.lower() and len(sentence.split()) > 3 for sentence in tasks.values())
    assert {len(real.get_task_init_states(number)) for number in range(10)} == {50}
    assert list(home.iterdir()) == []


def test_what_the_papers_call_long() -> None:
    pytest.importorskip("libero", reason="LIBERO's task definitions are not installed (hf-libero)")
    assert instructions("long")["libero_10/8"] == "put both moka pots on the stove"


@pytest.mark.parametrize("name", LIMITS)
def test_episodes_of_each_use(name: str) -> None:
    pytest.importorskip("libero", reason="LIBERO's task definitions are not installed (hf-libero)")
    benchmark = benchmark_of("object", read_profile(name))
    first = benchmark.partition.calibration.start
    assert benchmark.calibration_episodes(10) == [(task, first) for task in benchmark.tasks]  # as in the paper
    calibration = set(benchmark.calibration_episodes(80))
    assert len(calibration) == 80
    seeds = (*benchmark.evaluation_seeds(40), *benchmark.held_out_seeds(2))
    assert calibration.isdisjoint((task, seed) for task in benchmark.tasks for seed in seeds)
    with pytest.raises(ValueError, match="is not a calibration seed"):
        benchmark.calibration_episodes(81)
    with pytest.raises(ValueError, match="is not an evaluation seed"):
        benchmark.evaluation_seeds(41)
    with pytest.raises(ValueError, match="is not an evaluation seed"):
        benchmark.evaluation_seeds(1, first)
    with pytest.raises(ValueError, match="unknown task 'reach-v3'; LIBERO object has libero_object/0, "):
        benchmark.choose(["reach-v3"])


def test_what_to_choose_is_said() -> None:
    with pytest.raises(ValueError, match="suites are spatial, object, goal, long: choose one with --suite"):
        libero_suite(None, "openpi")
    with pytest.raises(ValueError, match=r"choose one with --profile lerobot\|omega-qvla\|openpi\|FILE.toml"):
        libero_suite("goal", None)
    with pytest.raises(ValueError, match=r"found goal\); for LIBERO's add --env libero"):
        api.benchmark_named("metaworld", "goal")
    with pytest.raises(ValueError, match="there is no benchmark 'robocasa'"):
        api.benchmark_named("robocasa")


def test_missing_packages_are_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find_spec", lambda name: None if name in ("libero", "robosuite") else object())
    with pytest.raises(LiberoError, match=r"LIBERO needs hf-libero, robosuite: pip install 'omega-qvla\["):
        libero_suite("goal", "openpi")


def test_missing_assets_are_said(home: Path, installed: Path) -> None:
    cached = home / ".cache" / "libero" / "assets"
    with pytest.raises(LiberoError, match=f"hf download lerobot/libero-assets .*--local-dir {cached}.*{installed}"):
        installation.check_installation()
    (cached / "scenes").mkdir(parents=True)
    with pytest.raises(LiberoError, match=f"{cached} lacks articulated_objects, stable_hope_objects"):
        installation.check_installation()
    assert not (home / ".libero").exists() and "LIBERO_CONFIG_PATH" not in os.environ


@pytest.mark.parametrize("place", ["package", "home"])
def test_with_assets_it_is_ready(place: str, home: Path, installed: Path) -> None:
    assets = installed / "assets" if place == "package" else home / ".cache" / "libero" / "assets"
    for folder in installation.ASSETS:
        (assets / folder).mkdir(parents=True)
    installation.check_installation()
    config = Path(os.environ["LIBERO_CONFIG_PATH"]) / "config.yaml"
    assert installation._read(config)["bddl_files"] == str(installed / "bddl_files")
    assert not (home / ".libero").exists()


def test_a_configuration_of_ones_own_is_heeded(home: Path, installed: Path, tmp_path: Path) -> None:
    own = home / ".libero" / "config.yaml"
    own.parent.mkdir()
    own.write_text(f"bddl_files: {installed / 'bddl_files'}\ninit_states: {installed / 'init_files'}\n")
    installation.prepare_import()
    assert "LIBERO_CONFIG_PATH" not in os.environ
    own.write_text("bddl_files: /nowhere\n")
    with pytest.raises(LiberoError, match=r"config.yaml names no folder as bddl_files: correct it, or remove"):
        installation.prepare_import()


def test_the_command_says_so_before_it_opens_a_policy(
    home: Path,
    installed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    which = ["--env", "libero", "--suite", "goal", "--profile", "openpi"]
    for command in (
        ["evaluate", str(tmp_path / "nothing"), *which, "--trials", "2"],
        ["quantize", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"), *which],
    ):
        monkeypatch.setattr(sys, "argv", ["omega-qvla", *command])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        errors = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and "\n" not in errors
        assert errors.startswith("error: LIBERO's meshes and textures are not installed: put them into ")
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main()
    assert "pip install 'omega-qvla[policies,libero]'" in capsys.readouterr().err  # as it is typed


def test_no_policy_is_judged_on_its_own_calibration(
    quantized: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever profile it was calibrated with."""
    pytest.importorskip("libero", reason="LIBERO's task definitions are not installed (hf-libero)")
    checkpoint = quantized("omega-int4")
    manifest = api.read_manifest(checkpoint)
    assert manifest.calibration is not None
    by_the_paper = benchmark_of("goal", read_profile("omega-qvla")).calibration_episodes(10)
    record = replace(manifest.calibration, trajectories=tuple(f"{task}:{seed}" for task, seed in by_the_paper))
    monkeypatch.setattr(api, "read_manifest", lambda directory: replace(manifest, calibration=record))
    evaluated: list[Any] = []
    monkeypatch.setattr(
        "omega_qvla.evaluation.run.evaluate_policies", lambda *given, **options: evaluated.append(given)
    )

    by_openpi = benchmark_of("goal", read_profile("openpi"))
    with pytest.raises(ValueError, match="was calibrated on libero_goal/0:0, which it would be judged on"):
        api.evaluate([checkpoint], benchmark=by_openpi, episodes_per_task=2)
    api.evaluate([checkpoint], benchmark=by_openpi, episodes_per_task=2, first_seed=1)
    api.evaluate([checkpoint], benchmark=benchmark_of("goal", read_profile("omega-qvla")), episodes_per_task=40)
    api.evaluate([checkpoint], benchmark=benchmark_of("object", read_profile("openpi")), episodes_per_task=2)
    assert len(evaluated) == 3


def test_a_policy_executes_what_the_profile_says(checkpoint: Path) -> None:
    assert api._load_for(3, checkpoint, "integer", "mine").execute_steps == 3
    assert api._load_for(None, checkpoint, "integer", "mine").execute_steps == api.load(checkpoint).execute_steps
