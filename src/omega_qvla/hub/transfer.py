"""Push and pull.

The manifest decides: what it does not name is neither sent nor fetched, but for the card.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo

from omega_qvla.hub.contents import HubError, check_listing, foreign, travelling
from omega_qvla.pack.checkpoint import read_manifest, verify
from omega_qvla.pack.manifest import CARD_FILE, MANIFEST_FILE, CheckpointError, Manifest

MANIFEST_LIMIT = 64 * 2**20
"""Bytes. A manifest lists the layers of a policy; one that is larger is none."""


def push(
    directory: Path,
    repository: str,
    card: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Send a checkpoint and its card in one commit, and return the commit's address.

    The repository is made if there is none, `private` or as its owner's settings say; so is the branch `revision`
    (the repository's main branch if `None`). Files that stand there under the same names are replaced.

    Raises `CheckpointError` for a damaged checkpoint, `HubError` for a file type that is not data, a repository that
    holds other files, or a Hub that says no. Then nothing was sent.
    """
    manifest = verify(directory)
    names = travelling(manifest)
    api = api or HfApi()
    with _in_a_sentence(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = api.model_info(repository, revision=revision)
        if other := foreign(_sizes(there), manifest):
            raise HubError(
                f"{repository} holds {other[0]}, which this checkpoint has not: name another repository, or remove it"
            )
        operations = [CommitOperationAdd(name, directory / name) for name in names]
        operations.append(CommitOperationAdd(CARD_FILE, card.encode()))
        commit = api.create_commit(
            repository,
            operations,
            commit_message=f"{manifest.plan.recipe.name} of {manifest.source.directory}",
            revision=revision,
            parent_commit=there.sha,
        )
    return commit.commit_url


def pull(repository: str, out: Path, *, revision: str | None = None, api: HfApi | None = None) -> Manifest:
    """Fetch a checkpoint into the new directory `out`, which appears when everything in it is verified.

    All files are of one commit. What is fetched lies in `.NAME.download` beside `out` until then: after an
    interruption the same call goes on from there, and what turns out to be damaged is removed.

    Raises `CheckpointError` if `out` exists, or for a damaged checkpoint or manifest; `HubError` if the repository
    holds no checkpoint, or anything else beside it, or cannot be read.
    """
    if out.exists():
        raise CheckpointError(f"{out} already exists; choose another directory or remove it")
    api = api or HfApi()
    download = out.with_name(f".{out.name}.download")
    with _in_a_sentence(repository):
        info = api.model_info(repository, revision=revision, files_metadata=True)
        _check_manifest(repository, _sizes(info))
        try:
            api.hf_hub_download(repository, MANIFEST_FILE, revision=info.sha, local_dir=download)
            manifest = read_manifest(download)
            check_listing(repository, _sizes(info), manifest)
            wanted = [name for name in (*travelling(manifest), CARD_FILE) if name in _sizes(info)]
            api.snapshot_download(repository, revision=info.sha, local_dir=download, allow_patterns=wanted)
            shutil.rmtree(download / ".cache", ignore_errors=True)  # the client's own notes
            verify(download)
        except (CheckpointError, HubError):
            shutil.rmtree(download, ignore_errors=True)
            raise
    os.rename(download, out)
    return manifest


def check_base(manifest: Manifest, base: str, revision: str | None, api: HfApi | None = None) -> str:
    """The commit of a repository whose weights are the ones that were quantized, by their hashes.

    Raises `HubError` if the repository's weights are others, or it cannot be read.
    """
    with _in_a_sentence(base):
        info = (api or HfApi()).model_info(base, revision=revision, files_metadata=True)
    published = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}
    for name, sha256 in manifest.source.sha256.items():
        if name.endswith(".safetensors") and published.get(name) != sha256:
            raise HubError(
                f"{base} at {info.sha} has no such {name} as was quantized; name the base model of this one"
            )
    return str(info.sha)


def _sizes(info: ModelInfo) -> dict[str, int | None]:
    return {file.rfilename: file.size for file in info.siblings or ()}


def _check_manifest(repository: str, sizes: dict[str, int | None]) -> None:
    if MANIFEST_FILE not in sizes:
        raise HubError(f"{repository} holds no quantized checkpoint: {MANIFEST_FILE} is missing")
    if (sizes[MANIFEST_FILE] or 0) > MANIFEST_LIMIT:
        raise HubError(f"{repository}: {MANIFEST_FILE} has {sizes[MANIFEST_FILE]} bytes, which no manifest has")


@contextmanager
def _in_a_sentence(repository: str) -> Iterator[None]:
    """Turns what the Hub's client says in paragraphs into one sentence."""
    try:
        yield
    except RevisionNotFoundError as error:
        raise HubError(f"{repository} has no such revision; name a branch, a tag or a commit of it") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"there is no repository {repository} that you may see: check its name, or log in with `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        said = error.server_message or error.response.reason_phrase
        raise HubError(f"the Hub refused {repository}: {error.response.status_code} {said}") from error
    except httpx.HTTPError as error:
        raise HubError(f"the Hub cannot be reached for {repository}: {error or type(error).__name__}") from error
