"""The endpoints of the Hugging Face Hub that push and pull use, on this machine: the real client talks to it.

Every commit is kept whole. Tensors are uploaded as large files (LFS) in one piece; the Hub's Xet storage is left out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

from huggingface_hub import HfApi, constants

Files = dict[str, bytes]


@dataclass
class Hub:
    """Repositories: name to branch to commits, oldest first."""

    repositories: dict[str, dict[str, list[Files]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: Files = field(default_factory=dict)
    """Uploaded large files by their SHA-256."""
    downloads: list[str] = field(default_factory=list)
    fail_after: int | None = None
    """Downloads after which the connection breaks."""
    api: HfApi = field(default_factory=HfApi)

    def make(self, name: str, files: Files) -> None:
        """A repository as somebody else left it."""
        self.repositories[name] = {"main": [files]}

    def files(self, name: str, branch: str = "main") -> Files:
        return self.repositories[name][branch][-1]


def commit_of(files: Files) -> str:
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha1(content).digest())
    return digest.hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def lfs_of(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        path = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if path == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if path == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if path[-1] == "batch":
            wanted = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.hub.api.endpoint}/upload/{file['oid']}"}} for file in wanted]
            objects = [file | {"actions": action} for file, action in zip(wanted, actions, strict=True)]
            return self._json({"transfer": "basic", "objects": objects})
        name, verb, revision = "/".join(path[2:4]), path[4], path[5]
        if verb == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in asked
            ]
            return self._json({"files": modes})
        if verb == "branch":
            return self._branch(name, revision)
        assert verb == "commit", self.path
        self._commit(name, revision, [json.loads(line) for line in body.decode().splitlines()])

    def do_PUT(self) -> None:
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == self.path.split("/")[-1]
        self.hub.large[self.path.split("/")[-1]] = content
        self._json({})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def do_HEAD(self) -> None:
        self._file(send=False)

    def do_GET(self) -> None:
        path = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if path[0] != "api":
            return self._file(send=True)
        name = "/".join(path[2:4])
        found = self._commit_at(name, path[5] if len(path) > 5 else "main")
        if found is None:
            return
        if path[4:5] == ["tree"]:
            entries = [self._entry(path, content) for path, content in sorted(found.items())]
            return self._json(entries)
        siblings = [
            {"rfilename": path, "size": len(content)} | ({"lfs": lfs_of(content)} if is_large(path) else {})
            for path, content in sorted(found.items())
        ]
        self._json({"id": name, "sha": commit_of(found), "private": False, "tags": [], "siblings": siblings})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.hub.repositories:
            return self._json({"error": "exists", "url": f"{self.hub.api.endpoint}/{name}"}, 409)
        self.hub.make(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.private[name] = asked.get("visibility") == "private"
        self._json({"url": f"{self.hub.api.endpoint}/{name}"})

    def _branch(self, name: str, branch: str) -> None:
        branches = self.hub.repositories[name]
        if branch in branches:
            return self._json({"error": "exists"}, 409)
        branches[branch] = list(branches["main"])
        self._json({})

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        before = self.hub.files(name, branch)
        assert lines[0]["value"]["parentCommit"] == commit_of(before)
        added = {
            line["value"]["path"]: self.hub.large[line["value"]["oid"]]
            if line["key"] == "lfsFile"
            else base64.b64decode(line["value"]["content"])
            for line in lines[1:]
        }
        self.hub.repositories[name][branch].append(before | added)
        oid = commit_of(before | added)
        self._json({"commitUrl": f"{self.hub.api.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def _file(self, *, send: bool) -> None:
        path = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        name, file = "/".join(path[:2]), "/".join(path[4:])
        found = self._commit_at(name, path[3])
        if found is None:
            return
        if file not in found:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = found[file]
        if send:
            if self.hub.fail_after is not None and len(self.hub.downloads) >= self.hub.fail_after:
                self.close_connection = True
                return
            self.hub.downloads.append(file)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": path[3]}
        self._send(200, content, headers | {"Content-Type": "application/octet-stream"}, send=send)

    def _commit_at(self, name: str, revision: str) -> Files | None:
        """The files of a branch or commit; answers itself if there are none."""
        branches = self.hub.repositories.get(name)
        if branches is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        if revision in branches:
            return branches[revision][-1]
        for commits in branches.values():
            for files in commits:
                if commit_of(files) == revision:
                    return files
        self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _json(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = {"Content-Type": "application/json"} | (headers or {})
        self._send(status, json.dumps(document).encode(), content, send=self.command != "HEAD")

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, send: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if send:
            self.wfile.write(content)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub with nothing on it, and a client for it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_of_a_test")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    xet, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield hub
    finally:
        constants.HF_HUB_DISABLE_XET = xet
        server.shutdown()
        server.server_close()
        thread.join()
