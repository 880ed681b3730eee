"""The command `omega-qvla reproduce`, and the list of what it knows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from omega_qvla import cli, studies
from omega_qvla.evaluation.metaworld.task import TASKS
from omega_qvla.studies import STUDIES, twin
from omega_qvla.studies.study import Cell, Options, Result


@dataclass
class Fake:
    """A study whose cells are values or errors."""

    values: dict[str, Any]
    name: str = "fake"
    summary: str = "values"
    published: str = "nowhere"
    asked: list[Options] = field(default_factory=list)

    def cells(self, options: Options) -> list[Cell]:
        self.asked.append(options)
        return [Cell(key, {}, lambda value=value: {"value": 1 / value}) for key, value in self.values.items()]

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        (out / "fake.md").write_text(" ".join(results))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake({"a": 1, "b": 2})
    monkeypatch.setattr(studies, "STUDIES", {"fake": found})
    monkeypatch.setattr(twin, "standard_sources", lambda out: {"policy": out / "policy"})
    return found


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["omega-qvla", "reproduce", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_a_study_is_run_on_its_sources_and_tasks(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "fake", "--out", tmp_path, "--workers", 1) == 0
    assert (tmp_path / "fake.md").read_text() == "a b"
    assert str(tmp_path / "fake.md") in capfd.readouterr().out
    chosen = ["--tasks", "push-v3, reach-v3", "--episodes", 2, "--only", "a"]
    assert run(monkeypatch, "fake", "--out", tmp_path, "--workers", 1, *chosen) == 0
    sources = {"policy": tmp_path / "policy"}
    assert fake.asked == [
        Options(tmp_path, sources, tuple(TASKS)),
        Options(tmp_path, sources, ("push-v3", "reach-v3"), 2, "a"),
    ]


def test_a_failure_is_named_and_says_how_to_go_on(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake.values["b"] = 0
    assert run(monkeypatch, "fake", "--out", tmp_path, "--workers", 1) == 2
    errors = capfd.readouterr().err
    assert "b (ZeroDivisionError" in errors and "running again computes only these" in errors
    assert (tmp_path / "fake.md").read_text().endswith("a")


@pytest.mark.usefixtures("fake")
def test_an_unknown_study_is_refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "table-1") == 2
    assert "there is no study 'table-1'; there are fake" in capfd.readouterr().err


def test_studies_are_listed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 0
    output = capfd.readouterr().out
    assert all(name in output for name in STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_its_name_and_a_source(name: str) -> None:
    assert STUDIES[name].name == name and STUDIES[name].summary and STUDIES[name].published


def test_an_unknown_name_is_no_study() -> None:
    assert "table-1" not in STUDIES and len(STUDIES) == len(list(STUDIES))
    with pytest.raises(KeyError):
        STUDIES["table-1"]
