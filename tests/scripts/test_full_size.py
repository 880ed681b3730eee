"""Stand-ins for released checkpoints, and what quantizing them takes, on small ones."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.policies.pi0 import PI0Config
from lerobot.policies.pi05 import PI05Config
from lerobot.policies.smolvla import SmolVLAConfig

import full_size
import stand_ins
from omega_qvla.policies import open_policy
from omega_qvla.policies.groot_n15 import architecture as groot
from omega_qvla.policies.paligemma_architecture import Architecture, GemmaSize, VisionSize
from omega_qvla.policies.random_observations import random_observations
from omega_qvla.studies.twin import site_peaks
from stand_ins.lerobot_layout import LerobotStandIn, settings
from stand_ins.nvidia_layout import GrootN15StandIn
from stand_ins.weights import _draw, weights
from stand_ins.words import tokenizer

CHUNK = 4
SIZES = {"chunk_size": CHUNK, "n_action_steps": 2, "max_state_dim": 4, "max_action_dim": 6}


def small(family: str) -> stand_ins.StandIn:
    """A few layers of the family, 128 channels wide."""
    if family == "groot_n15":
        return small_groot()
    if family == "smolvla":
        return small_smolvla()
    stack = GemmaSize(128, depth=2, mlp_dim=256, num_heads=8, num_kv_heads=1, head_dim=16)
    tower = VisionSize(128, depth=1, mlp_dim=128, num_heads=4, patch_size=32)
    features = settings(image=96, state=4, action=4) | SIZES | {"image_resolution": (96, 96)}
    config = {"pi05": PI05Config, "pi0": PI0Config}[family](**features, tokenizer_max_length=32, dtype="bfloat16")
    return LerobotStandIn(config, Architecture(tower, stack, stack, len(tokenizer())))


def small_smolvla() -> LerobotStandIn:
    text = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 8, "head_dim": 16, "vocab_size": len(tokenizer()) + 4}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    layers = {"num_vlm_layers": 2, "expert_width_multiplier": 0.5, "resize_imgs_with_padding": (32, 32)}
    config = SmolVLAConfig(**settings(image=32, state=4, action=4) | SIZES | layers)
    return LerobotStandIn(config, vlm={"text_config": text, "vision_config": vision, "scale_factor": 2})


def small_groot() -> GrootN15StandIn:
    eagle = groot.EagleSize(
        image_token_index=90,
        vision_config=groot.VisionSize(64, 128, 1, 4, image_size=28, patch_size=14),
        text_config=groot.LanguageSize(100, 128, 256, 3, 4, 2, 32, max_position_embeddings=256, rope_theta=1e6),
    )
    head = groot.ActionHeadSize(
        action_dim=8,
        action_horizon=CHUNK,
        max_state_dim=8,
        hidden_size=64,
        input_embedding_dim=128,
        backbone_embedding_dim=128,
        num_inference_timesteps=4,
        diffusion_model_cfg=groot.DiffusionSize(4, 32, 2, None, 64, 128, True, "ada_norm"),
        vl_self_attention_cfg=groot.SelfAttentionSize(4, 32, 1, None),
    )
    return GrootN15StandIn(groot.Architecture(eagle, groot.BackboneSize(2), head), shard_bytes=2**20)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small stand-in of a family; read-only."""

    @cache
    def make(family: str) -> Path:
        out = tmp_path_factory.mktemp("stand-in") / family
        stand_ins.make(small(family), out)
        return out

    return make


@pytest.mark.parametrize("family", stand_ins.FAMILIES)
def test_a_stand_in_opens_strictly_and_acts(family: str, made: Callable[[str], Path]) -> None:
    policy = open_policy(made(family))
    observation = random_observations(made(family), 2)
    noise = torch.randn(2, *policy.noise_shape, generator=torch.Generator().manual_seed(0))
    actions = policy.infer(observation, noise)
    assert policy.family == family and actions.shape[:2] == (2, CHUNK)
    assert np.ptp(actions, axis=1).min() > 0.01


def test_every_input_of_language_and_action_has_outliers(made: Callable[[str], Path]) -> None:
    peaks = site_peaks(open_policy(made("pi05")), random_observations(made("pi05"), 2))
    assert len(peaks) == 16
    for site, peak in peaks.items():
        assert peak.max() > 5 * peak.median(), site


def test_weights_follow_from_the_seed(made: Callable[[str], Path]) -> None:
    files = {}
    for seed in (0, 0, 1):
        drawn = weights("pi05", made("pi05"), seed)
        name = "model.paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight"
        files.setdefault(seed, []).append(torch.cat([piece.flatten() for piece in drawn[name].read()]))
    assert torch.equal(*files[0]) and not torch.equal(files[0][0], files[1][0])


def test_dtypes_are_mixed_and_copies_left_out(made: Callable[[str], Path]) -> None:
    stored = open_policy(made("pi05")).stored_tensors()
    assert {stored.dtype(name) for name in stored.names()} == {torch.float32, torch.bfloat16}
    assert not any(name.endswith("embed_tokens.weight") and "language_model" in name for name in stored.names())


def test_large_files_are_cut(made: Callable[[str], Path]) -> None:
    files = sorted(made("groot_n15").glob("*.safetensors"))
    assert [file.name for file in files[:1]] == [f"model-00001-of-{len(files):05}.safetensors"] and len(files) > 1
    assert len(open_policy(made("groot_n15")).stored_tensors().names()) > 50


def test_a_large_tensor_is_drawn_in_pieces() -> None:
    pieces = list(_draw("up_proj.weight", (3000, 1024), torch.bfloat16, 0.0, False, 0))
    assert len(pieces) == 3 and sum(piece.numel() for piece in pieces) == 3000 * 1024
    assert abs(float(torch.cat(pieces).float().std()) * 1024**0.5 - 1) < 0.01


@pytest.mark.parametrize(
    ("family", "in_float32", "in_bfloat16", "size"),
    [("pi05", 558, 254, 8_300_616_768), ("pi0", 523, 254, 7_839_075_392), ("groot_n15", 314, 584, 6_964_658_048)],
)
def test_released_sizes(family: str, in_float32: int, in_bfloat16: int, size: int, tmp_path: Path) -> None:
    """Tensors by dtype, and bytes, as lerobot's modules have them, without one of two that are tied."""
    stand_ins.released(family).write_support(tmp_path)
    drawn = weights(family, tmp_path, 0)
    dtypes = Counter(source.dtype for source in drawn.values())
    assert dtypes == {torch.float32: in_float32, torch.bfloat16: in_bfloat16}
    assert sum(source.nbytes for source in drawn.values()) == size


def test_families_without_a_stand_in_are_refused() -> None:
    with pytest.raises(ValueError, match="no stand-in for a policy of family 'openvla'; there are pi05"):
        stand_ins.released("openvla")


def test_a_checkpoint_without_words_is_refused(tmp_path: Path) -> None:
    features = {"observation.state": {"type": "STATE", "shape": [4]}}
    (tmp_path / "config.json").write_text(json.dumps({"input_features": features}))
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing; put the policy's tokenizer there"):
        random_observations(tmp_path, 1)


def test_a_process_that_fails_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        full_size.taken_by([sys.executable, "-c", "raise SystemExit(3)"])
    assert full_size.taken_by([sys.executable, "-c", "import time; time.sleep(0.2)"]).seconds > 0.2


@pytest.mark.slow
def test_a_measurement(made: Callable[[str], Path], tmp_path: Path) -> None:
    job = full_size.Job(str(made("pi05")), "omega-int4", "policy", [], observations=2, memory_budget=8 * 2**30)
    result = full_size.measured(job, tmp_path / "out")
    assert json.loads((tmp_path / "out" / full_size.MEASUREMENT).read_text()) == result
    assert result["checkpoint"]["quantized_linears"] == 28
    assert (tmp_path / "out" / full_size.CHECKPOINT / "manifest.json").is_file()
    assert result["taken"]["memory"] > 100 * 2**20 and result["taken"]["seconds"] > 0
    assert result["predicted"]["memory"]["process"] > 100 * 2**20
    assert full_size.table(result).row_count == 11 and result["forward_seconds"] > 0


@pytest.mark.slow
def test_a_run_that_is_killed_writes_the_same_bytes(made: Callable[[str], Path]) -> None:
    job = full_size.Job(str(made("pi05")), "omega-int4", "policy", [], observations=2, memory_budget=8 * 2**30)
    result = full_size.interrupted(job, kills=2, seed=0)
    assert result["identical"] and result["killed_after_blocks"]
    assert {"manifest.json", "quantized.safetensors", "kept.safetensors"} <= set(result["files"])
