"""lerobot's LIBERO environment under our profiles, around a stand-in for the simulator alone.

Tasks, sentences and initial states are those of the real package.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from stand_in_libero import OffScreenRenderEnv

from omega_qvla import api
from omega_qvla.evaluation import report, results
from omega_qvla.evaluation.benchmark import Benchmark
from omega_qvla.evaluation.libero.installation import prepare_import
from omega_qvla.evaluation.libero.profile import Profile, Suite, read_profile
from omega_qvla.evaluation.libero.suite import benchmark_of
from omega_qvla.evaluation.rollout import EnvironmentPool, Episode, run_block
from omega_qvla.evaluation.run import Candidate, evaluate_policies
from omega_qvla.policy import Observation

pytest.importorskip("libero", reason="LIBERO's task definitions are not installed (hf-libero)")
WAITING = np.array([0, 0, 0, 0, 0, 0, -1])


@pytest.fixture(autouse=True)
def simulators(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[OffScreenRenderEnv]]:
    """Those that are made, in their order; what imported them is forgotten afterwards."""
    for variable in ("LIBERO_CONFIG_PATH", "MUJOCO_GL"):  # what is set for the import stays in the test
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(OffScreenRenderEnv, "made", [], raising=False)
    prepare_import()
    stand_in = ModuleType("libero.libero.envs")
    stand_in.OffScreenRenderEnv = OffScreenRenderEnv  # type: ignore[attr-defined]
    importers = ("lerobot.envs.libero", "omega_qvla.evaluation.libero.task")
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    for name in importers:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield OffScreenRenderEnv.made
    for name in importers:
        sys.modules.pop(name, None)


@dataclass
class Hand:
    """Pushes the hand towards the origin, or nowhere."""

    label: str = "full precision"
    execution: str = "float"
    noise_shape: tuple[int, int] = (8, 7)
    execute_steps: int = 8
    gain: float = 0.5
    gripper: float = 1.0
    seen: list[Observation] = field(default_factory=list)

    def infer(self, observation: Observation, noise: torch.Tensor) -> np.ndarray:
        self.seen.append(observation)
        actions = np.zeros((len(observation), *self.noise_shape), np.float32)
        actions[..., :3] = -self.gain * observation.state[:, None, :3]
        actions[..., -1] = self.gripper
        return actions

    def denoise(self, observation: Observation, noise: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.infer(observation, noise))[None]

    def resident_bytes(self) -> int:
        return 0


def run(policy: Hand, benchmark: Benchmark, *episodes: tuple[str, int]) -> list[Episode]:
    pool = EnvironmentPool(benchmark.factory)
    return run_block(policy, list(episodes), pool, lanes=1, max_steps=benchmark.max_steps)


@pytest.mark.parametrize("name", ["openpi", "lerobot", "omega-qvla"])
@pytest.mark.parametrize("suite", ["spatial", "object", "goal", "long"])
def test_an_episode_is_the_profiles(name: str, suite: Suite, simulators: list[OffScreenRenderEnv]) -> None:
    """A policy that never succeeds waits as long and acts as long as the profile says, from the state it says."""
    profile = replace(read_profile(name), camera_size=16, image_size=None)  # nobody looks
    benchmark = benchmark_of(suite, profile)
    task, state = list(benchmark.tasks)[3], benchmark.partition.evaluation.start
    policy = Hand(gain=0.0, gripper=0.3, execute_steps=8)
    with api._executing(policy, benchmark):
        assert run(policy, benchmark, (task, state)) == [Episode(task, state, False, benchmark.max_steps)]
    assert len(policy.seen) == math.ceil(benchmark.max_steps / {"openpi": 5, "lerobot": 8, "omega-qvla": 1}[name])
    (simulator,) = simulators
    waited, acted = simulator.actions[: profile.wait_steps], simulator.actions[profile.wait_steps :]
    assert all((action == WAITING).all() for action in waited)
    assert not any((action == WAITING).all() for action in acted)
    assert len(acted) == profile.step_limit(suite)
    assert simulator.seeds[-1] == {"openpi": 7, "lerobot": 1000 + state, "omega-qvla": 0}[name]
    from libero.libero import benchmark as real

    states = real.get_benchmark_dict()[{"long": "libero_10"}.get(suite, f"libero_{suite}")]().get_task_init_states(3)
    np.testing.assert_array_equal(simulator.states[-1], states[state])


def test_success_ends_an_episode_and_the_next_starts_from_its_own_state(simulators: list[OffScreenRenderEnv]) -> None:
    benchmark = benchmark_of("goal", read_profile("openpi"))
    together = run(Hand(), benchmark, ("libero_goal/0", 5), ("libero_goal/0", 2))
    assert all(episode.success and episode.steps < 50 for episode in together)
    assert run(Hand(), benchmark, ("libero_goal/0", 2)) == together[1:]  # whatever ran before
    with pytest.raises(ValueError, match="has initial states 0 to 49, not 50"):
        run(Hand(), benchmark, ("libero_goal/0", 50))


def observed(profile: Profile) -> Any:
    environment = benchmark_of("goal", profile).factory("libero_goal/4")
    environment.reset(0)
    return environment


def test_the_state_is_what_lerobots_processor_makes_of_it() -> None:
    from lerobot.processor.env_processor import LiberoProcessorStep

    environment = observed(read_profile("lerobot"))
    raw = environment._observation["robot_state"]
    batch = {
        key: {name: torch.as_tensor(value)[None] for name, value in part.items()}
        for key, part in raw.items()
        if key != "joints"
    }
    pixels = torch.as_tensor(environment._observation["pixels"]["image"]).permute(2, 0, 1)[None]
    theirs = LiberoProcessorStep().observation({"observation.robot_state": batch, "observation.images.image": pixels})
    state = environment.proprioception()
    assert state.shape == (8,) and state.dtype == np.float32
    np.testing.assert_allclose(state, theirs["observation.state"][0].numpy(), rtol=1e-6)
    turned = theirs["observation.images.image"][0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(environment.images()["image"], turned)


def test_angles_go_up_to_a_full_turn() -> None:
    from omega_qvla.evaluation.libero.task import axis_angle

    for angle in (0.0, 1e-4, 1.0, np.pi, 4.0, 2 * np.pi - 1e-4):
        axis = np.array([1.0, -2.0, 2.0]) / 3
        turn = axis_angle(np.append(axis * np.sin(angle / 2), np.cos(angle / 2)))
        np.testing.assert_allclose(turn, axis * angle, atol=1e-7)
        same = Rotation.from_rotvec(turn) * Rotation.from_rotvec(axis * angle).inv()
        assert same.magnitude() < 1e-6
    np.testing.assert_array_equal(axis_angle(np.array([0.0, 0.0, 0.0, 1.0 + 1e-9])), np.zeros(3))


@pytest.mark.parametrize(("rotation", "corner"), [(180, (-1, -1)), (0, (0, 0))])
def test_images_are_turned(rotation: Any, corner: tuple[int, int]) -> None:
    images = observed(replace(read_profile("omega-qvla"), image_rotation=rotation)).images()
    assert images["image"].shape == (256, 256, 3) and images["image"].flags["C_CONTIGUOUS"]
    assert tuple(images["image"][corner]) == (255, 0, 0)
    assert (images["image"][..., 0] > 200).sum() == 1


def test_images_are_resized_and_have_the_names_of_every_layout() -> None:
    images = observed(read_profile("openpi")).images()
    assert set(images) == {"image", "image2", "wrist_image", "base_0_rgb", "left_wrist_0_rgb"}
    assert {image.shape for image in images.values()} == {(224, 224, 3)}
    assert images["base_0_rgb"] is images["image"] and images["left_wrist_0_rgb"] is images["wrist_image"]
    assert images["image"].mean() > 1.9 * images["wrist_image"].mean()


@pytest.mark.parametrize(
    ("name", "given", "executed"),
    [("openpi", 0.3, 0.3), ("omega-qvla", 0.9, -1.0), ("omega-qvla", 0.2, 1.0), ("omega-qvla", 0.5, 0.0)],
)
def test_the_gripper(name: str, given: float, executed: float, simulators: list[OffScreenRenderEnv]) -> None:
    environment = observed(read_profile(name))
    environment.step(np.array([0.1] * 6 + [given], np.float32))
    np.testing.assert_allclose(simulators[0].actions[-1], [0.1] * 6 + [executed], rtol=1e-6)


def test_another_robots_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="actions have 4 dimensions, LIBERO's robot 7"):
        observed(read_profile("openpi")).step(np.zeros(4, np.float32))


def test_of_many_inferences_some_are_recorded(simulators: list[OffScreenRenderEnv]) -> None:
    benchmark = benchmark_of("goal", replace(read_profile("omega-qvla"), camera_size=16))
    assert benchmark.record_every(1) == 8 and benchmark.record_every(5) == 1
    policy = Hand(gain=0.5)
    calibration = api.calibrate_on_rollouts(policy, 1, benchmark=benchmark)
    (actions,) = [simulator.actions[10:] for simulator in simulators]
    assert len(policy.seen) == len(actions) > 16  # a new chunk for every action
    assert len(calibration.observations) == math.ceil(len(actions) / 8)


def test_calibration_and_evaluation_of_a_suite(tmp_path: Path, simulators: list[OffScreenRenderEnv]) -> None:
    benchmark = replace(benchmark_of("goal", read_profile("openpi")), calibration_observations=20)
    policy = Hand()
    calibration = api.calibrate_on_rollouts(policy, 12, benchmark=benchmark)
    assert calibration.trajectories == tuple(
        [f"libero_goal/{number}:42" for number in range(10)] + [f"libero_goal/{number}:43" for number in range(2)]
    )
    assert len(calibration.observations) == 20
    assert calibration.observations.instructions[0] == "open the middle drawer of the cabinet"
    assert policy.execute_steps == 8  # its own again
    assert all(simulator.closed for simulator in simulators)

    policies = Hand(execute_steps=5), Hand("weak", gain=0.001, execute_steps=5)
    evaluation = evaluate_policies(
        [Candidate(partial(replace, policy)) for policy in policies],
        benchmark,
        tasks=["libero_goal/1", "libero_goal/7"],
        episodes_per_task=2,
        lanes=4,
        latency_repeats=0,
    )
    assert [policy.success().rate for policy in evaluation.policies] == [1.0, 0.0]
    assert evaluation.seeds == (0, 1) and evaluation.fidelity_seeds == (40,)
    assert (evaluation.benchmark, evaluation.max_steps) == ("LIBERO goal", 300)
    assert evaluation.conditions["profile"] == "openpi" and evaluation.conditions["suite"] == "libero_goal"
    assert evaluation.instructions["libero_goal/7"] == "turn on the stove"
    assert {each.execute_steps for each in evaluation.policies} == {5}
    results.save(evaluation, tmp_path / "evaluation.json")
    assert results.load(tmp_path / "evaluation.json") == evaluation
    told = report.circumstances(evaluation)
    assert ("profile", "openpi") in told and ("libero_goal/7", "“turn on the stove”") in told
