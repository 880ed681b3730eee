"""What is measured, by hand, and when a gate fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from omega_qvla.evaluation import motion
from omega_qvla.gate.verdict import Answers, GateCheck, Gripper, verdicts
from omega_qvla.spec import GateSpec

N, CHUNK, WIDTH = 40, 6, 3
LOW, HIGH = np.array([-1.0, -2.0, -1.0]), np.array([1.0, 2.0, 1.0])
PAIRS = [(i, i + 1) for i in range(N - 1)]


@pytest.fixture
def answers() -> Answers:
    """A policy that is as good as the noise; the last dimension is a gripper that is open or closed."""
    generator = np.random.default_rng(0)
    reference = generator.uniform(LOW, HIGH, (N, CHUNK, WIDTH)) / 2
    reference[..., 2] = np.where(np.arange(N)[:, None] % 2, 0.8, -0.8)
    redrawn = reference + 0.3 * generator.standard_normal(reference.shape)
    redrawn[..., 2] = reference[..., 2]
    return Answers(reference, reference.copy(), redrawn)


DEFAULT = GateSpec()


def run(answers: Answers, limits: GateSpec = DEFAULT, **other: object) -> list[GateCheck]:
    given: dict = {"bounds": (LOW, HIGH), "consecutive": PAIRS, "executed": 3} | other
    return list(verdicts(answers, limits, given.pop("gripper", Gripper()), **given)[0])


def failed(checks: list[GateCheck]) -> set[str]:
    return {check.measure for check in checks if not check.passed}


def test_full_precision_passes_against_itself(answers: Answers) -> None:
    checks = run(answers)
    assert not failed(checks)
    assert all(check.value == 0 for check in checks if check.measure not in ("jerk", "splice jump"))
    assert all(check.value == check.own for check in checks if check.measure in ("jerk", "splice jump"))
    measured = {(check.measure, check.dimension) for check in checks}
    graded = ("error p50", "error p95", "error p99", "error max", "jerk", "splice jump")
    assert measured == {(measure, d) for measure in graded for d in (0, 1)} | {
        ("gripper flips", 2),
        *(("newly at limits", d) for d in range(3)),
    }


def test_other_noise_is_as_far_off_as_itself(answers: Answers) -> None:
    """Held to limits of 1, full precision under other noise is just at all of them."""
    ones = replace(GateSpec(), error_p50=1, error_p95=1, error_p99=1, error_max=1)
    checks = [each for each in run(replace(answers, policy=answers.redrawn), ones) if each.own > 0]
    assert all(each.value == each.own for each in checks if each.measure.startswith("error"))
    assert not failed([each for each in checks if each.measure not in ("jerk", "splice jump")])


def test_limits_are_multiples_of_the_own_spread(answers: Answers) -> None:
    shifted = answers.reference + np.array([0.2, 0, 0])
    spread = np.percentile(np.abs(answers.redrawn - answers.reference), 95, axis=(0, 1))[0]
    for multiple, passes in ((0.19 / spread, False), (0.21 / spread, True)):
        limits = GateSpec(error_p50=9, error_p95=multiple, error_p99=9, error_max=9)
        checks = run(replace(answers, policy=shifted), limits)
        assert ("error p95" not in failed(checks)) == passes


def test_what_is_too_small_to_matter_passes(answers: Answers) -> None:
    silent = replace(
        answers, redrawn=answers.reference
    )  # noise changes nothing: the resolution alone allows anything
    for size, passes in ((0.039, True), (0.041, False)):  # of a range of 2, two in a hundred
        checks = run(replace(silent, policy=answers.reference + np.array([size, 0, 0])))
        assert (not failed(checks)) == passes


def test_the_gripper_is_judged_by_its_side(answers: Answers) -> None:
    weak = answers.reference.copy()
    weak[..., 2] *= 0.1
    assert not failed(run(replace(answers, policy=weak)))
    turned = answers.reference.copy()
    turned[:2, :, 2] *= -1
    checks = run(replace(answers, policy=turned))
    assert failed(checks) == {"gripper flips"}
    assert next(check.value for check in checks if check.measure == "gripper flips") == pytest.approx(2 / N)
    assert not failed(run(replace(answers, policy=turned), replace(GateSpec(), resolution=0.06)))
    without = run(replace(answers, policy=turned), gripper=Gripper(None))
    assert {check.dimension for check in without if check.measure == "error max"} == {0, 1, 2}


def test_flips_by_hand() -> None:
    reference = np.array([[1.0, 1.0, -1.0, 0.05, -0.05]])
    actions = np.array([[-1.0, 0.5, 1.0, -1.0, 0.05]])
    assert motion.flips(actions, reference, 0.0, 0.1) == pytest.approx(2 / 5)
    assert motion.flips(actions, reference, 0.0, 0.0) == pytest.approx(4 / 5)
    assert motion.flips(actions + 7, reference + 7, 7.0, 0.1) == pytest.approx(2 / 5)


def test_jerk_by_hand() -> None:
    cubic = (np.arange(6.0) ** 3)[None, :, None]
    assert motion.jerk(cubic) == pytest.approx([6.0])
    assert motion.jerk((np.arange(6.0) ** 2)[None, :, None]) == pytest.approx([0.0])
    alternating = np.tile([1.0, -1.0], 3)[None, :, None]
    assert motion.jerk(alternating) == pytest.approx([8.0])


def test_trembling_fails_though_every_error_is_small(answers: Answers) -> None:
    smooth = 0.2 * np.linspace(0, 1, CHUNK)[None, :, None] * answers.reference[:, :1]
    tremble = 0.06 * np.tile([1.0, -1.0], CHUNK // 2)[None, :, None] * np.array([1.0, 0, 0])
    checks = run(Answers(smooth, smooth + tremble, smooth + (answers.redrawn - answers.reference)))
    assert failed(checks) == {"jerk"}


def test_splices_by_hand() -> None:
    chunks = np.array([[0.0, 1.0, 2.0, 9.0], [5.0, 6.0, 7.0, 9.0], [7.0, 0.0, 0.0, 0.0]])[..., None]
    assert motion.splice_jump(chunks, [(0, 1), (1, 2)], 3) == pytest.approx([np.sqrt((3**2 + 0**2) / 2)])
    assert motion.splice_jump(chunks, [(0, 1)], 1) == pytest.approx([5.0])


def test_saturation_counts_what_quantization_drives_to_the_limits(answers: Answers) -> None:
    inside = replace(answers, redrawn=answers.reference)
    driven = answers.reference.copy()
    driven[:4, :, 1] = 1.99
    checks = run(replace(inside, policy=driven), GateSpec(error_max=99, error_p99=99, error_p95=99, error_p50=99))
    check = next(check for check in checks if (check.measure, check.dimension) == ("newly at limits", 1))
    assert check.value == pytest.approx(4 / N) and not check.passed
    already = replace(inside, reference=driven, redrawn=driven, policy=driven)
    assert "newly at limits" not in failed(run(already))


def test_what_cannot_be_measured_is_said(answers: Answers) -> None:
    still = answers.reference.copy()
    still[..., 0] = 0.25
    short = Answers(still[:, :3], still[:, :3], answers.redrawn[:, :3])
    checks, missing = verdicts(short, GateSpec(), Gripper(), bounds=None, consecutive=[], executed=3)
    assert {line.split(":")[0] for line in missing} == {"dimension 0", "jerk", "splice jump", "saturation"}
    assert {check.dimension for check in checks if check.measure.startswith("error")} == {1}


def test_a_gripper_that_there_is_not(answers: Answers) -> None:
    with pytest.raises(ValueError, match="cannot be dimension 3: an action has 3"):
        run(answers, gripper=Gripper(3))
