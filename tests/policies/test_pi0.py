"""What pi0 has, and pi0.5 in part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from omega_qvla import api
from omega_qvla.policies import load_policy, open_policy
from omega_qvla.policies.lerobot_policy import LerobotPolicy
from omega_qvla.policies.stored import WEIGHTS_FILE
from omega_qvla.policy import Observation

Source = Callable[[str], Path]
Opened = Callable[[str], LerobotPolicy]

PALIGEMMA = "model.paligemma_with_expert.paligemma"


def test_relative_actions_are_added_to_the_state(
    source: Source, opened: Opened, observations: Observation, noise: Tensor, tmp_path: Path
) -> None:
    shutil.copytree(source("pi0"), tmp_path / "relative")
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        file = tmp_path / "relative" / name
        pipeline = json.loads(file.read_text())
        switched = [step["config"] for step in pipeline["steps"] if "enabled" in step["config"]]
        assert len(switched) == 1
        switched[0]["enabled"] = True
        file.write_text(json.dumps(pipeline))
    actions = open_policy(tmp_path / "relative").infer(observations, noise)
    expected = opened("pi0").infer(observations, noise) + observations.state[:, None]
    assert np.allclose(actions, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_embeddings_that_are_missing_are_those_of_the_language_head(
    family: str, source: Source, observations: Observation, noise: Tensor, tmp_path: Path
) -> None:
    """As lerobot's own loader has it; the quantized checkpoint does not hold them twice either."""
    embeddings, head = f"{PALIGEMMA}.model.language_model.embed_tokens.weight", f"{PALIGEMMA}.lm_head.weight"
    tensors = load_file(source(family) / WEIGHTS_FILE)
    actions = []
    for name, change in (("both", {embeddings: tensors[head].clone()}), ("one", {})):
        shutil.copytree(source(family), tmp_path / name)
        kept = {key: tensor for key, tensor in tensors.items() if key != embeddings} | change
        save_file(kept, tmp_path / name / WEIGHTS_FILE, metadata={"format": "pt"})
        api.quantize(tmp_path / name, "rtn", tmp_path / f"{name}-rtn")
        policies = open_policy(tmp_path / name), load_policy(tmp_path / f"{name}-rtn")
        actions.append([policy.infer(observations, noise) for policy in policies])
    assert np.array_equal(actions[0], actions[1])
    assert embeddings not in load_file(tmp_path / "one-rtn" / "kept.safetensors")
