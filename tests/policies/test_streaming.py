"""A policy whose blocks stay on disk is the same policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies import open_policy
from omega_qvla.policies.lerobot_policy import LerobotPolicy
from omega_qvla.policies.stored import StoredTensors
from omega_qvla.policies.streaming import StreamedLinear, StreamedWeights
from omega_qvla.policy import Observation
from tiny_policy import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_actions_are_those_of_the_resident_policy(
    source: Callable[[str], Path],
    opened: Callable[[str], LerobotPolicy],
    family: str,
    observations: Observation,
    noise: Tensor,
) -> None:
    streamed = open_policy(source(family), streamed=True)
    linears = {name for site in streamed.sites() for name in site.linears}
    assert all(isinstance(streamed.module.get_submodule(name), StreamedLinear) for name in linears)
    expected = opened(family).infer(observations, noise)
    found = streamed.infer(observations, noise)
    if family == "smolvla":  # its VLM runs in bfloat16, in which a streamed linear rounds once instead of as it sums
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    else:
        assert np.array_equal(found, expected)
    for name in linears:
        assert torch.equal(streamed.weight(name), streamed.stored_tensors().read(f"{name}.weight"))


def test_no_more_stays_in_memory_than_may(source: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stored = StoredTensors.open(source("pi05"))
    names = [name for name in stored.names() if name.endswith("proj.weight")]
    weights = StreamedWeights(stored, capacity=200_000)
    read: list[str] = []
    original = StoredTensors.read

    def counted(self: StoredTensors, name: str) -> Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(StoredTensors, "read", counted)
    for name in [*names, *names]:
        weights.get(name, torch.float32)
        held = list(weights._recent.values())
        assert sum(weight.nbytes for weight in held) <= 200_000 or len(held) == 1
        weights.get(name, torch.float32)
    assert read == [*names, *names]


def test_rehearsed_linears_give_zeros_and_read_nothing(
    source: Callable[[str], Path], observations: Observation, noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = open_policy(source("pi05"), streamed=True)

    def refuse(self: StoredTensors, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    layer = policy.module.get_submodule(policy.sites()[-1].linears[0])
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with monkeypatch.context() as patch, policy.rehearsing():
        patch.setattr(StoredTensors, "read", refuse)
        policy.infer(observations, noise)
    assert len(outputs) == policy.denoising_steps and not any(output.any() for output in outputs)
    policy.infer(observations, noise)
    assert outputs[-1].any()
    handle.remove()


def test_a_weight_that_is_not_finite_is_named_when_the_policy_is_opened(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    copytree(source("pi05"), tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("gemma_expert.model.layers.1.mlp.down_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} contains NaN"):
        open_policy(tmp_path / "damaged", streamed=True)


def test_a_streamed_linear_has_no_values() -> None:
    linear = StreamedLinear(nn.Linear(4, 2), "x.weight", StreamedWeights(StoredTensors(Path("x"), {}), 0))
    assert linear.weight.device.type == "meta" and linear.weight.shape == (2, 4)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_one_checkpoint(
    source: Callable[[str], Path],
    family: str,
    streamed: bool,
    observations: Observation,
    noise: Tensor,
    tmp_path: Path,
) -> None:
    sharded = tmp_path / "sharded"
    copytree(source(family), sharded)
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    place = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for shard in set(place.values()):
        save_file({name: tensors[name] for name in names if place[name] == shard}, sharded / shard)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    found = open_policy(sharded, streamed=streamed).infer(observations[:2], noise[:2])
    expected = open_policy(source(family), streamed=streamed).infer(observations[:2], noise[:2])
    assert np.array_equal(found, expected)
