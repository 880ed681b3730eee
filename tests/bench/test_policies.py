"""A chunk of actions, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla.bench.policies import Entry, inference_stages, measure_policies
from omega_qvla.bench.report import write_policies
from omega_qvla.policies.pi05 import PI05
from omega_qvla.policies.random_observations import random_observations


def test_the_stages_are_the_whole(floating: PI05) -> None:
    stages = inference_stages(floating, random_observations(floating.directory, 1))
    assert len(stages.steps) == floating.denoising_steps
    assert min(stages.before, stages.vision, stages.language, stages.after, *stages.steps) > 0
    parts = stages.before + stages.vision + stages.language + stages.action + stages.after
    assert stages.whole == pytest.approx(parts)


def test_policies_are_measured_and_reported(
    checkpoint: Path, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    entries = [
        Entry("full", checkpoint),
        Entry("full, ONNX Runtime", checkpoint, onnx_runtime=("language", "action")),
        Entry("omega-int4", quantized("omega-int4")),
    ]
    rounds: list[tuple[int, int]] = []
    found = measure_policies(entries, [1], rounds=1, warm_up=1, on_round=lambda *done: rounds.append(done))
    assert [each.label for each in found] == [entry.label for entry in entries]
    assert rounds == [(1, 2), (2, 2)] and found[2].resident_bytes < found[0].resident_bytes
    write_policies(tmp_path, found, {"torch": "2"}, 1)
    assert "| omega-int4 (integer) |" in (tmp_path / "policies.md").read_text()
    assert len(json.loads((tmp_path / "policies.json").read_text())["policies"]) == 3
    assert (tmp_path / "policies.svg").is_file()


def test_onnx_runtime_computes_the_same(checkpoint: Path, floating: PI05) -> None:
    observation = random_observations(checkpoint, 1)
    noise = torch.zeros(1, *floating.noise_shape)
    peer = Entry("peer", checkpoint, onnx_runtime=("language", "action")).open(1)
    assert np.allclose(peer.infer(observation, noise), floating.infer(observation, noise), atol=1e-3)


def test_onnx_runtime_is_compared_in_floating_point(quantized: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="is quantized: ONNX Runtime is compared on a policy in floating point"):
        Entry("peer", quantized("omega-int4"), onnx_runtime=("language", "action")).open(1)


def test_times_need_a_round(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="at least one round, not 0"):
        measure_policies([Entry("full", checkpoint)], [1], rounds=0)
