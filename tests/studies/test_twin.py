"""The twin is the same function with other activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omega_qvla.policies import open_policy
from omega_qvla.policy import Observation
from omega_qvla.studies import twin as twin_module
from omega_qvla.studies.twin import (
    PUBLISHED_RATIOS,
    TwinError,
    make_twin,
    outlier_scales,
    scale_norm,
    standard_sources,
)


def test_outliers_are_powers_of_two_that_meet_the_ratio() -> None:
    peak = torch.rand(256, generator=torch.Generator().manual_seed(0)) + 0.5
    for ratio in (4.4, 27.5, 219.3):
        scale = outlier_scales(peak, ratio)
        assert (scale.log2() == scale.log2().round()).all() and (scale >= 1).all()
        assert (scale > 1).sum() == 256 // 64
        raised = peak * scale
        assert ratio / 2**0.5 <= raised.max() / raised.median() <= ratio * 2**0.5


def test_a_scaled_norm_and_its_readers_are_the_same_function() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, reader = torch.randn(8, generator=generator), torch.randn(3, 8, generator=generator)
    x, scale = torch.randn(5, 8, generator=generator), torch.tensor([1.0, 4, 1, 1, 16, 1, 1, 2])
    tensors = {"norm.weight": weight, "q.weight": reader}
    before = (x * (1 + weight)) @ reader.t()
    scale_norm(tensors, "norm", ["q"], scale)
    after = x * (1 + tensors["norm.weight"])
    torch.testing.assert_close(after, x * (1 + weight) * scale)
    torch.testing.assert_close(after @ tensors["q.weight"].t(), before)


@pytest.fixture(scope="module")
def made(
    checkpoint: Path, observations: Observation, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, tuple[float, float]]]:
    out = tmp_path_factory.mktemp("twin") / "twin"
    return out, make_twin(checkpoint, out, observations)


def test_the_twin_acts_alike(
    made: tuple[Path, dict[str, tuple[float, float]]],
    checkpoint: Path,
    observations: Observation,
    noise: torch.Tensor,
) -> None:
    twin, policy = open_policy(made[0]), open_policy(checkpoint)
    assert abs(twin.infer(observations, noise) - policy.infer(observations, noise)).max() < 1e-4
    ours, theirs = (
        {name: stored.read(name) for name in stored.names()}
        for stored in (twin.stored_tensors(), policy.stored_tensors())
    )
    assert ours.keys() == theirs.keys() and any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_twin_has_the_published_outliers(made: tuple[Path, dict[str, tuple[float, float]]]) -> None:
    for name, (_, after) in made[1].items():
        if not name.endswith("attention_output"):  # its channels are shared by both stacks
            part = "action" if "expert" in name.split(".")[2] else "language"
            wanted = PUBLISHED_RATIOS[part][name.rpartition(".")[2]][int(name.split(".")[-2])]
            assert wanted / 2 <= after <= wanted * 2, name


def test_another_function_is_refused(
    checkpoint: Path, observations: Observation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin_module, "TOLERANCE", -1.0)
    with pytest.raises(TwinError, match="differs by"):
        make_twin(checkpoint, tmp_path / "twin", observations)
    assert not list(tmp_path.iterdir())


def test_the_twin_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(checkpoint: Path, out: Path) -> None:
        made.append(out)
        out.mkdir()

    monkeypatch.setattr(twin_module, "make_twin", make)
    first, again = standard_sources(tmp_path), standard_sources(tmp_path)
    assert first == again and made == [first["twin"]] and first["twin"].parent == tmp_path
