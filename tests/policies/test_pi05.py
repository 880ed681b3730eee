"""pi0.5 as a policy: every recipe on it, and which directories are none. See test_families.py for the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from omega_qvla.kernels import native
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies import load_policy, open_or_load, open_policy
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policy import Observation
from omega_qvla.runtime import QuantizedLinear
from omega_qvla.spec import read_recipe, recipe_names

Quantized = Callable[[str], Path]


@pytest.fixture(scope="module")
def elsewhere(
    quantized: Quantized, infer_elsewhere: Callable[[list[Path]], list[np.ndarray]]
) -> dict[str, np.ndarray]:
    """Actions of the quantized policies in a new process."""
    return dict(zip(recipe_names(), infer_elsewhere([quantized(name) for name in recipe_names()]), strict=True))


def linears_of(policy: PI05) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in policy.module.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("name", recipe_names())
def test_a_new_process_computes_the_same_actions(
    name: str,
    quantized: Quantized,
    observations: Observation,
    noise: Tensor,
    elsewhere: dict[str, np.ndarray],
) -> None:
    assert np.array_equal(load_policy(quantized(name)).infer(observations, noise), elsewhere[name])


@pytest.mark.parametrize("name", recipe_names())
def test_integers_and_simulation_agree(
    name: str, quantized: Quantized, observations: Observation, noise: Tensor
) -> None:
    integer, simulated = (load_policy(quantized(name), how) for how in ("integer", "simulated"))
    assert np.array_equal(integer.infer(observations, noise), simulated.infer(observations, noise))
    best = read_recipe(name).execution
    assert simulated.execution == ("simulated" if best == "integer" else best)
    assert integer.execution == best
    assert "integer" not in {x.execution for x in linears_of(simulated).values()}


@pytest.mark.skipif(not native.available(), reason="no kernels were compiled")
def test_compiled_kernels_change_no_bit_of_the_default_recipe(
    quantized: Quantized, observations: Observation, noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = load_policy(quantized("omega-int4")).infer(observations, noise)
    monkeypatch.setattr(native, "available", tuple)
    assert np.array_equal(load_policy(quantized("omega-int4")).infer(observations, noise), compiled)


@pytest.mark.parametrize("name", recipe_names())
def test_quantized_actions_are_near_those_in_floating_point(
    name: str, quantized: Quantized, floating: PI05, observations: Observation, noise: Tensor
) -> None:
    expected = floating.infer(observations, noise)
    actions = load_policy(quantized(name)).infer(observations, noise)
    relative = np.square(actions - expected).mean() / np.square(expected).mean()
    assert 0 < relative < 0.2


def test_a_quantized_policy_is_smaller_in_memory(quantized: Quantized, floating: PI05) -> None:
    integer, simulated = (load_policy(quantized("rtn"), how) for how in ("integer", "simulated"))
    assert integer.resident_bytes() < simulated.resident_bytes()
    assert integer.resident_bytes() < floating.resident_bytes()


def test_both_kinds_of_directory_open(checkpoint: Path, quantized: Quantized) -> None:
    assert open_or_load(checkpoint).label == "full precision"
    assert open_or_load(quantized("rtn")).label == "rtn"


def test_the_first_dense_of_every_norm_matters(floating: PI05) -> None:
    """Otherwise the denoising time would be invisible and every step alike."""
    dense = [m for name, m in floating.module.named_modules() if name.endswith("norm.dense")]
    assert dense and all(m.weight.abs().max() > 0 for m in dense)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"holds no lerobot checkpoint: config\.json is missing"),
        ("{", r"config\.json is not JSON"),
        ('{"type": "act"}', r"config\.json is of a policy of type 'act'; supported: pi05, pi0, smolvla"),
        ("{}", r"config\.json states no type of policy"),
        ("[]", r"config\.json holds no JSON object"),
    ],
)
def test_directories_of_something_else(config: str | None, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        open_policy(tmp_path)


def test_an_architecture_file_of_another_form(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "other")
    (tmp_path / "other" / "architecture.json").write_text('{"vision": {}}')
    with pytest.raises(ValueError, match=r"architecture\.json does not describe a pi0\.5 architecture"):
        open_policy(tmp_path / "other")
