"""What a run is said to need, against what it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from omega_qvla.calibration import Needs, collect
from omega_qvla.calibration.rehearsal import rehearse
from omega_qvla.policies import open_policy
from omega_qvla.policies.base import AdaptedPolicy
from omega_qvla.policy import Observation
from omega_qvla.quantization.plan import build_plan
from omega_qvla.quantization.preflight import Preflight, ResourceError, preflight
from omega_qvla.spec import read_recipe


@pytest.fixture(scope="module")
def streamed(checkpoint: Path) -> AdaptedPolicy:
    return open_policy(checkpoint, streamed=True)


@pytest.fixture(scope="module")
def needed(
    streamed: AdaptedPolicy, observations: Observation, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int | None], Preflight]:
    scratch = tmp_path_factory.mktemp("scratch")
    plan = build_plan(read_recipe("omega-int4"), streamed)

    def ask(budget: int | None) -> Preflight:
        return preflight(streamed, plan, observations, budget=budget, scratch=scratch, kept_bytes=0)

    return ask


def test_the_rehearsal_counts_the_tokens_of_the_run(streamed: AdaptedPolicy, observations: Observation) -> None:
    sites = streamed.sites()
    rehearsal = rehearse(streamed, sites, [], observations)
    found = collect(streamed, dict.fromkeys(sites, Needs()), observations[:1], noise_seed=0)
    assert rehearsal.tokens == {name: statistics.tokens for name, statistics in found.items()}


def test_without_a_budget_nothing_is_spilled(needed: Callable[[int | None], Preflight]) -> None:
    needs = needed(None)
    assert needs.room.activations is None and needs.room.lockstep
    assert needs.memory.total > needs.memory.process > 0
    assert needs.disk > 0 and needs.forward_seconds > 0 and needs.solving_seconds > 0


def test_a_budget_is_kept_as_far_as_it_goes(
    needed: Callable[[int | None], Preflight], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10**9))  # by the process, which asking changes
    monkeypatch.setattr(psutil, "Process", lambda: used)
    most = needed(None).memory
    for less in (0, 10_000, 100_000):
        budget = most.total - less
        try:
            needs = needed(budget)
        except ResourceError:
            assert less
            continue
        assert needs.memory.total <= budget


def test_a_budget_that_does_not_suffice_is_refused(needed: Callable[[int | None], Preflight]) -> None:
    with pytest.raises(ResourceError, match=r"needs \d+\.\d GiB of memory at least, the budget is 0\.0 GiB; raise"):
        needed(2**20)


def test_a_disk_that_does_not_suffice_is_refused(
    streamed: AdaptedPolicy, observations: Observation, tmp_path: Path
) -> None:
    plan = build_plan(read_recipe("omega-int4"), streamed)
    with pytest.raises(ResourceError, match=r"needs .* GiB of disk, .* has .* GiB left; free some"):
        preflight(streamed, plan, observations, budget=None, scratch=tmp_path, kept_bytes=2**60)
