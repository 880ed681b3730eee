"""The card says what the files say, and claims no evidence that there is not."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from omega_qvla import api
from omega_qvla.evaluation.results import Evaluation, PolicyResult, describe_machine, manifest_digest
from omega_qvla.evaluation.rollout import Episode
from omega_qvla.hub import HubError, Origin, model_card, write_card
from omega_qvla.hub.card import part_sizes, recipe_to_toml
from omega_qvla.pack.checkpoint import read_manifest, verify
from omega_qvla.pack.inspect import inspect
from omega_qvla.spec import read_recipe, recipe_from_dict, recipe_names, with_settings

Quantized = Callable[[str], Path]
TASKS, SEEDS = ("reach", "push"), (0, 1, 2)


def judged(directory: Path) -> Evaluation:
    """An evaluation in which the quantized policy loses one episode of six."""

    def result(label: str, path: Path | None, lost: int) -> PolicyResult:
        episodes = [Episode(task, seed, True, 10) for task in TASKS for seed in SEEDS]
        episodes[:lost] = [replace(episode, success=False) for episode in episodes[:lost]]
        digest = None if path is None else manifest_digest(path)
        name = None if path is None else path.name
        return PolicyResult(label, "integer", name, 1, 1, 2, tuple(episodes), manifest_sha256=digest)

    recipe = read_manifest(directory).plan.recipe.name
    policies = (result("full precision", None, 0), result("another", None, 6), result(recipe, directory, 1))
    return Evaluation(describe_machine(), TASKS, SEEDS, 100, 8, policies)


@pytest.mark.parametrize("name", recipe_names())
def test_the_recipe_of_a_card_is_the_recipe(name: str) -> None:
    for recipe in (read_recipe(name), with_settings(read_recipe(name), ["gate.error_p95=0.2"])):
        assert recipe_from_dict(tomllib.loads(recipe_to_toml(recipe))) == recipe


def test_the_card_holds_what_the_files_say(quantized: Quantized) -> None:
    directory = quantized("omega-int4")
    card, manifest, report = model_card(directory), read_manifest(directory), inspect(directory)
    recipe = re.search(r"```toml\n(.*?)```", card, re.DOTALL)
    assert recipe and recipe_from_dict(tomllib.loads(recipe[1])) == manifest.plan.recipe
    for digest in manifest.source.sha256.values():
        assert digest in card
    assert manifest.calibration is not None
    for trajectory in manifest.calibration.trajectories:
        assert f"`{trajectory}`" in card
    for size in (report.total_bytes, report.quantized_bytes, report.kept_bytes):
        assert f"{size:,}" in card
    assert "W4A4" in card
    assert "Nobody has judged this checkpoint" in card
    assert str(directory) not in card


def test_bytes_of_the_parts_add_up(quantized: Quantized) -> None:
    directory = quantized("omega-int4")
    report = inspect(directory)
    parts = part_sizes(report, read_manifest(directory))
    assert sum(part.bytes for part in parts) == report.codes_bytes + report.scales_bytes  # no biases in this policy
    assert sum(2 * part.weights for part in parts) == report.fp16_bytes


@pytest.mark.parametrize("recipe", ["omega-qvla", "gptq"])
def test_a_width_that_is_not_executed_is_not_claimed(recipe: str, quantized: Quantized) -> None:
    directory = quantized(recipe)
    report = inspect(directory)
    executions = {linear.part: linear.execution for linear in report.linears if linear.quantized}
    assert set(executions.values()) > {"integer"} or "integer" not in executions.values()
    for part in part_sizes(report, read_manifest(directory)):
        execution = executions[part.part]
        assert bool(re.fullmatch(r"W\dA\d", part.width)) == (execution == "integer")
        assert execution == "integer" or execution in part.width


def test_metadata_is_for_the_hub(quantized: Quantized) -> None:
    origin = Origin("someone/base", "abc123", "apache-2.0")
    card = model_card(quantized("rtn"), origin)
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "someone/base" and metadata["base_model_relation"] == "quantized"
    assert metadata["license"] == "apache-2.0" and metadata["pipeline_tag"] == "robotics"
    assert "`abc123`" in card
    unsaid = model_card(quantized("rtn"))
    assert not {"base_model", "base_model_relation", "license"} & set(yaml.safe_load(unsaid.split("---")[1]))
    assert "Not stated" in unsaid


def test_evidence_is_about_this_checkpoint(quantized: Quantized) -> None:
    directory = quantized("omega-int4")
    evaluation = judged(directory)
    card = model_card(directory, evidence=evaluation)
    success = evaluation.policies[2].success()
    assert f"{100 * success.rate:.1f} % (5/6)" in card
    assert f"[{100 * success.low:.1f}, {100 * success.high:.1f}]" in card
    assert "| another |" not in card and "| omega-int4 |" in card and evaluation.machine.cpu in card
    assert [line for line in card.splitlines() if re.match("# ", line)] == [
        f"# {read_manifest(directory).source.directory}, quantized with omega-int4"
    ]


def test_evidence_about_others_is_refused(quantized: Quantized) -> None:
    evaluation = judged(quantized("omega-int4"))
    with pytest.raises(HubError, match="does not judge"):
        model_card(quantized("rtn"), evidence=evaluation)
    changed = replace(evaluation.policies[2], manifest_sha256="0" * 64)
    with pytest.raises(HubError, match="judges another checkpoint"):
        model_card(
            quantized("omega-int4"), evidence=replace(evaluation, policies=(*evaluation.policies[:2], changed))
        )
    old = replace(evaluation.policies[2], manifest_sha256=None)
    card = model_card(quantized("omega-int4"), evidence=replace(evaluation, policies=(*evaluation.policies[:2], old)))
    assert "5/6" in card and "by its name" in card


def test_a_card_in_the_checkpoint_changes_nothing_else(quantized: Quantized, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(quantized("omega-int4"), tmp_path / "checkpoint"))
    before = inspect(directory)
    for text in ("# first", "# second"):
        assert write_card(directory, text).read_text() == text
    assert inspect(directory) == before and verify(directory) == read_manifest(directory)
    assert api.load(directory).execution == "integer"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_only_the_card_may_lie_there(quantized: Quantized, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(quantized("rtn"), tmp_path / "checkpoint"))
    (directory / "policy" / "README.md").write_text("not here")
    with pytest.raises(ValueError, match=r"policy/README\.md does not belong"):
        verify(directory)


def test_a_recipe_without_a_gate_does_not_state_one(quantized: Quantized) -> None:
    manifest = json.loads((quantized("rtn") / "manifest.json").read_text())
    assert "gate" not in manifest["plan"]["recipe"]
