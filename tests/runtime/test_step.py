import pytest

from omega_qvla.runtime import DenoisingStep, StepError


def test_outside_a_step() -> None:
    step = DenoisingStep(4)
    assert not step.running
    with pytest.raises(StepError, match="no denoising step is running"):
        _ = step.current


def test_inside_a_step() -> None:
    step = DenoisingStep(4)
    for index in range(4):
        with step.at(index):
            assert step.running and step.current == index
    assert not step.running


@pytest.mark.parametrize("index", [-1, 4, 10])
def test_a_step_that_was_never_calibrated(index: int) -> None:
    step = DenoisingStep(4)
    with (
        pytest.raises(StepError, match=f"step {index} was never seen; the policy has steps 0 to 3"),
        step.at(index),
    ):
        pass
    assert not step.running


def test_an_exception_ends_the_step() -> None:
    step = DenoisingStep(4)
    with pytest.raises(ZeroDivisionError), step.at(2):
        _ = 1 / 0
    assert not step.running
