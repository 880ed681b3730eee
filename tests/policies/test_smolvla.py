"""What SmolVLA has alone: a VLM that its checkpoint only names, and layers that attend by turns."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.policies.smolvla import SmolVLAPolicy
from torch import Tensor
from transformers import AutoConfig, SmolVLMForConditionalGeneration

from omega_qvla import api
from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies import load_policy, open_policy
from omega_qvla.policies.float_products import float_products
from omega_qvla.policies.smolvla import VLM_DIRECTORY
from omega_qvla.policy import Observation
from omega_qvla.spec import RecipeError
from tiny_policy import random_noise, random_observations, save_smolvla

Source = Callable[[str], Path]


def stated(source: Path, out: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other settings in `config.json`."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))
    return out


@pytest.mark.parametrize("load_vlm_weights", [False, True])
def test_the_policy_is_the_one_that_lerobot_opens(
    load_vlm_weights: bool, source: Source, observations: Observation, tmp_path: Path
) -> None:
    """Also where lerobot loads the VLM's own weights first, which decides about the dtype."""
    vlm = tmp_path / "hub"
    shutil.copytree(source("smolvla") / VLM_DIRECTORY, vlm)
    config = AutoConfig.from_pretrained(vlm)
    SmolVLMForConditionalGeneration(config).save_pretrained(vlm)
    config.text_config.dtype = torch.bfloat16 if load_vlm_weights else torch.float32
    config.save_pretrained(vlm)
    changes = {"vlm_model_name": str(vlm), "load_vlm_weights": load_vlm_weights}
    checkpoint = stated(source("smolvla"), tmp_path / "policy", **changes)
    shutil.rmtree(checkpoint / VLM_DIRECTORY)
    expected = SmolVLAPolicy.from_pretrained(checkpoint)
    shutil.copytree(vlm, checkpoint / VLM_DIRECTORY, ignore=shutil.ignore_patterns("*.safetensors"))
    policy, noise = open_policy(checkpoint), random_noise(8, 2)
    loaded = policy.module.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    batch = policy._preprocessor(policy._batch(observations))
    with float_products():
        chunk = expected.predict_action_chunk(dict(batch), noise=noise)
    assert np.array_equal(policy.infer(observations, noise), policy._postprocessor(chunk).float().numpy())


def test_the_vlm_of_a_quantized_checkpoint_is_its_own(
    source: Source, observations: Observation, noise: Tensor, tmp_path: Path
) -> None:
    """No hub is asked, and no file of the VLM's weights is copied."""
    checkpoint = stated(source("smolvla"), tmp_path / "policy", vlm_model_name="/nowhere")
    (checkpoint / VLM_DIRECTORY / "model.safetensors").write_bytes(b"large")
    api.quantize(checkpoint, "rtn", tmp_path / "rtn")
    load_policy(tmp_path / "rtn").infer(observations, noise)
    assert not list((tmp_path / "rtn" / "policy").rglob("*/model.safetensors"))


def test_a_vlm_that_is_not_there(source: Source, tmp_path: Path) -> None:
    checkpoint = stated(source("smolvla"), tmp_path / "policy", vlm_model_name="/nowhere/vlm")
    shutil.rmtree(checkpoint / VLM_DIRECTORY)
    with pytest.raises(CheckpointError, match=r"cannot be built: .*; put the .* files of /nowhere/vlm into .*/vlm"):
        open_policy(checkpoint)


def test_actions_in_joint_angles_are_refused(source: Source, tmp_path: Path) -> None:
    checkpoint = stated(source("smolvla"), tmp_path / "policy", adapt_to_pi_aloha=True)
    with pytest.raises(CheckpointError, match="adapt_to_pi_aloha is not supported"):
        open_policy(checkpoint)


@pytest.mark.parametrize(
    ("changes", "crossing"),
    [
        ({}, {1}),
        ({"num_vlm_layers": 3}, {1}),
        ({"self_attn_every_n_layers": -1}, {0, 1}),
        ({"attention_mode": "self_attn"}, set()),
        ({"num_vlm_layers": 2, "num_expert_layers": 1}, set()),
    ],
)
def test_layers_that_attend_to_the_cache_alone(changes: dict[str, Any], crossing: set[int], tmp_path: Path) -> None:
    """Their projections of keys and values have the cached width, which differs from the expert's."""
    save_smolvla(tmp_path / "policy", 0, **changes)
    policy = open_policy(tmp_path / "policy")
    expert = [site for site in policy.sites() if site.part == "action"]
    found = {
        int(re.findall(r"\.layers\.(\d+)", site.block)[0]) for site in expert if site.name.endswith("cross_keys")
    }
    assert found == crossing
    policy.infer(random_observations(1, seed=0), random_noise(1, seed=0))


def test_corrections_and_reconstruction_are_refused(
    source: Source, calibration: api.CalibrationSet, tmp_path: Path
) -> None:
    """lerobot computes this attention outside its modules, and calls no layer as a whole."""
    with pytest.raises(RecipeError, match="the policy offers no attention there to correct"):
        api.quantize(source("smolvla"), "quantvla", tmp_path / "corrected", calibration=calibration)
    with pytest.raises(ValueError, match=r"layers\.0 cannot be reconstructed: it never ran"):
        api.quantize(source("smolvla"), "omniquant", tmp_path / "learned", calibration=calibration)
