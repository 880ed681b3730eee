"""card, push and pull as a user meets them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_stand_in import Hub, commit_of, running_hub

from omega_qvla.hub import model_card, transfer
from omega_qvla.pack.checkpoint import verify

NAME = "someone/tiny"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """What the commands take for the Hub."""
    with running_hub() as hub:
        monkeypatch.setattr(transfer, "HfApi", lambda: hub.api)
        yield hub


@pytest.fixture
def directory(quantized: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized("rtn"), tmp_path / "checkpoint"))


def test_a_card_is_printed_or_written(run: Run, directory: Path) -> None:
    code, output, _ = run("card", directory)
    assert code == 0 and output.strip() == model_card(directory).strip()
    assert not (directory / "README.md").exists()
    code, output, _ = run("card", directory, "--write")
    assert code == 0 and (directory / "README.md").read_text() == model_card(directory)


def test_there_and_back(run: Run, hub: Hub, directory: Path, tmp_path: Path) -> None:
    code, output, _ = run("push", directory, NAME, "--private")
    assert code == 0 and commit_of(hub.files(NAME)) in output.replace("\n", "") and hub.private[NAME]
    code, output, _ = run("pull", NAME, tmp_path / "again")
    assert code == 0 and "recipe rtn" in output
    assert verify(tmp_path / "again") == verify(directory)


def test_a_written_card_is_sent_as_it_is(run: Run, hub: Hub, directory: Path) -> None:
    (directory / "README.md").write_text("# by hand\n")
    code, _, errors = run("push", directory, NAME, "--license", "mit")
    assert code == 2 and "card --write" in errors and not hub.repositories
    assert run("push", directory, NAME)[0] == 0
    assert hub.files(NAME)["README.md"] == b"# by hand\n"


def test_the_base_model_is_the_one_that_was_quantized(run: Run, hub: Hub, directory: Path, checkpoint: Path) -> None:
    weights = (checkpoint / "model.safetensors").read_bytes()
    own = {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    hub.make("someone/base", own)
    hub.make("someone/other", own | {"model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])})
    code, _, errors = run("push", directory, NAME, "--base-model", "someone/other")
    assert code == 2 and "no such model.safetensors" in errors and NAME not in hub.repositories
    assert run("push", directory, NAME, "--base-model", "someone/base")[0] == 0
    card = hub.files(NAME)["README.md"].decode()
    assert commit_of(own) in card and "base_model: someone/base" in card


def test_refusals_are_one_sentence(run: Run, hub: Hub, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text("{}")
    for arguments in (
        ("pull", "someone/nobody", tmp_path / "out"),
        ("pull", "no name at all", tmp_path / "out"),
        ("push", tmp_path, NAME),
        ("card", directory, "--evidence", tmp_path / "evaluation.json"),
        ("card", directory, "--evidence", tmp_path / "nothing.json"),
    ):
        code, _, errors = run(*arguments)
        assert code == 2 and errors.startswith("error: ") and "\n" not in errors.strip(), errors
    assert not hub.repositories and not (tmp_path / "out").exists()
