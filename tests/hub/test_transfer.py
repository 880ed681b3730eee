"""Push and pull with the real client against a stand-in of the Hub: only what is verified travels or appears."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_stand_in import Hub, commit_of, running_hub

from omega_qvla.hub import HubError, model_card, pull, push
from omega_qvla.pack.checkpoint import verify
from omega_qvla.pack.manifest import CARD_FILE, MANIFEST_FILE, CheckpointError

NAME = "someone/tiny-omega-int4"
Quantized = Callable[[str], Path]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def directory(quantized: Quantized, tmp_path: Path) -> Path:
    """A checkpoint to do anything with."""
    return Path(shutil.copytree(quantized("omega-int4"), tmp_path / "checkpoint"))


@pytest.fixture
def pushed(hub: Hub, directory: Path) -> Hub:
    push(directory, NAME, model_card(directory), api=hub.api)
    return hub


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_is_pulled_is_what_was_pushed(pushed: Hub, directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "there" / "again"
    manifest = pull(NAME, out, api=pushed.api)
    assert manifest == verify(out) == verify(directory)
    assert contents(out) == contents(directory) | {CARD_FILE: model_card(directory).encode()}
    assert [path.name for path in out.parent.iterdir()] == ["again"]


def test_nothing_travels_that_the_manifest_does_not_name(pushed: Hub, directory: Path) -> None:
    assert set(pushed.files(NAME)) == set(contents(directory)) | {CARD_FILE, ".gitattributes"}


def test_a_repository_is_private_when_asked(hub: Hub, directory: Path) -> None:
    push(directory, NAME, "# card", private=True, api=hub.api)
    assert hub.private == {NAME: True}


def test_a_revision_is_a_branch_of_its_own(pushed: Hub, quantized: Quantized, tmp_path: Path) -> None:
    before = commit_of(pushed.files(NAME))
    push(quantized("rtn"), NAME, "# another", revision="naive", api=pushed.api)
    assert commit_of(pushed.files(NAME)) == before
    assert pull(NAME, tmp_path / "naive", revision="naive", api=pushed.api).plan.recipe.name == "rtn"
    assert pull(NAME, tmp_path / "main", api=pushed.api).plan.recipe.name == "omega-int4"
    assert pull(NAME, tmp_path / "commit", revision=before, api=pushed.api).plan.recipe.name == "omega-int4"


def test_a_damaged_checkpoint_is_not_pushed(hub: Hub, directory: Path) -> None:
    file = directory / "kept.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="damaged"):
        push(directory, NAME, "# card", api=hub.api)
    assert not hub.repositories


def test_a_foreign_file_is_not_pushed(hub: Hub, directory: Path) -> None:
    (directory / "secret.txt").write_text("password")
    with pytest.raises(CheckpointError, match=r"secret\.txt does not belong"):
        push(directory, NAME, "# card", api=hub.api)
    assert not hub.repositories


@pytest.mark.parametrize("name", ["policy/modeling.py", "policy/weights.bin", "policy/a b.json", CARD_FILE])
def test_only_data_is_pushed(name: str, hub: Hub, directory: Path) -> None:
    name_in_manifest(directory, name)
    with pytest.raises(HubError, match="the manifest names the file"):
        push(directory, NAME, "# card", api=hub.api)
    assert not hub.repositories


def test_somebody_elses_repository_is_left_alone(hub: Hub, directory: Path) -> None:
    theirs = {"model.safetensors": b"theirs", CARD_FILE: b"theirs"}
    hub.make(NAME, theirs)
    with pytest.raises(HubError, match=r"holds model\.safetensors"):
        push(directory, NAME, "# card", api=hub.api)
    assert hub.files(NAME) == theirs


def test_pull_refuses_what_the_manifest_does_not_name(pushed: Hub, tmp_path: Path) -> None:
    pushed.files(NAME)["policy/modeling.py"] = b"import os"
    with pytest.raises(HubError, match=r"holds policy/modeling\.py"):
        pull(NAME, tmp_path / "out", api=pushed.api)
    assert set(pushed.downloads) <= {MANIFEST_FILE}
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.download").exists()


def test_pull_refuses_code_even_if_the_manifest_names_it(pushed: Hub, directory: Path, tmp_path: Path) -> None:
    name_in_manifest(directory, "policy/modeling.py")
    pushed.make(NAME, contents(directory))
    with pytest.raises(HubError, match=r"policy/modeling\.py"):
        pull(NAME, tmp_path / "out", api=pushed.api)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../outside.json", "policy/../../outside.json", "/tmp/outside.json"])
def test_pull_refuses_names_that_lead_elsewhere(name: str, pushed: Hub, tmp_path: Path) -> None:
    manifest = json.loads(pushed.files(NAME)[MANIFEST_FILE])
    manifest["files"][name] = {"bytes": 2, "sha256": "0"}
    pushed.make(NAME, pushed.files(NAME) | {MANIFEST_FILE: json.dumps(manifest).encode()})
    with pytest.raises(HubError, match="no plain name"):
        pull(NAME, tmp_path / "out", api=pushed.api)


def test_pull_refuses_altered_content_of_the_right_size(pushed: Hub, tmp_path: Path) -> None:
    content = pushed.files(NAME)["quantized.safetensors"]
    pushed.make(NAME, pushed.files(NAME) | {"quantized.safetensors": content[:-1] + bytes([content[-1] ^ 1])})
    with pytest.raises(CheckpointError, match="damaged"):
        pull(NAME, tmp_path / "out", api=pushed.api)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("change", [lambda content: None, lambda content: content[:-1]])
def test_pull_refuses_before_it_downloads_what_cannot_be_whole(
    change: Callable[[bytes], bytes | None], pushed: Hub, tmp_path: Path
) -> None:
    files = dict(pushed.files(NAME))
    changed = change(files.pop("kept.safetensors"))
    pushed.make(NAME, files if changed is None else files | {"kept.safetensors": changed})
    with pytest.raises(HubError, match=r"kept\.safetensors"):
        pull(NAME, tmp_path / "out", api=pushed.api)
    assert set(pushed.downloads) <= {MANIFEST_FILE}


@pytest.mark.slow  # the client tries again for seconds
def test_a_pull_that_broke_goes_on(pushed: Hub, directory: Path, tmp_path: Path) -> None:
    pushed.fail_after = 4
    with pytest.raises(HubError, match="cannot be reached"):
        pull(NAME, tmp_path / "out", api=pushed.api)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.download").is_dir()
    pushed.fail_after = None
    pull(NAME, tmp_path / "out", api=pushed.api)
    assert verify(tmp_path / "out") == verify(directory)
    assert sorted(pushed.downloads) == sorted(set(pushed.downloads)), "nothing was fetched twice"


def test_nothing_is_overwritten(pushed: Hub, directory: Path) -> None:
    with pytest.raises(CheckpointError, match="already exists"):
        pull(NAME, directory, api=pushed.api)


def test_refusals_are_sentences(hub: Hub, pushed: Hub, tmp_path: Path) -> None:
    pushed.make("someone/else", {"model.safetensors": b""})
    for name, revision, reason in (
        ("someone/nobody", None, "no repository someone/nobody"),
        (NAME, "missing", "no such revision"),
        ("someone/else", None, "holds no quantized checkpoint"),
    ):
        with pytest.raises(HubError, match=reason) as refused:
            pull(name, tmp_path / "out", revision=revision, api=hub.api)
        assert "\n" not in str(refused.value)


def name_in_manifest(directory: Path, name: str) -> None:
    """Add a file that the manifest vouches for."""
    import hashlib

    (directory / name).write_text("x")
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))
