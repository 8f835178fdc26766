"""A hub of our own on the loopback interface: enough of its API for the real client, and faults.

What it serves are plain files in memory. Every request is noted; a fault is a function that is
asked before each answer and may answer itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from support import Tensor, safetensors_header

_LARGE = 1 << 10  # bytes from which a file is in LFS storage here


@dataclass
class Request:
    """A request as it arrived."""

    method: str
    path: str  #: unquoted
    headers: Mapping[str, str]
    file: str = ""  #: of a repository, where one is asked for
    number: int = 0  #: how many requests of this method for this path came before

    @property
    def range(self) -> tuple[int, int] | None:
        """The first byte asked for, and the one after the last."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        return (int(found[1]), int(found[2]) + 1 if found[2] else 1 << 62) if found else None


@dataclass
class Commit:
    """The files of a repository at one commit."""

    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        names = "".join(f"{name}:{blob_of(data)}" for name, data in sorted(self.files.items()))
        return hashlib.sha1(names.encode()).hexdigest()


@functools.lru_cache(64)  # large files are hashed once, not for each of their ranges
def blob_of(data: bytes) -> str:
    """A git blob's id."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@functools.lru_cache(64)
def etag_of(data: bytes) -> str:
    """As the hub has it: the SHA-256 of what is in LFS storage, else the blob's id."""
    return hashlib.sha256(data).hexdigest() if len(data) >= _LARGE else blob_of(data)


@dataclass
class Hub:
    """The repositories, the faults, and what was asked."""

    repositories: dict[str, dict[str, Commit]] = field(default_factory=dict)  #: repo -> revisions
    private: set[str] = field(default_factory=set)  #: need the token
    gated: set[str] = field(default_factory=set)  #: may be listed; their files need the token
    token: str = "hf_letmein"
    bare: bool = False  #: listings say only the names of the files
    storage: str = ""  #: large files are redirected to this URL
    requests: list[Request] = field(default_factory=list)
    #: gives True where it has answered, or None
    fault: Callable[[Request, Handler], bool | None] = lambda request, handler: None
    endpoint: str = ""
    _seen: dict[tuple[str, str], int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, repo: str, files: Mapping[str, bytes], *revisions: str) -> str:
        """A commit, to which ``main`` or the given revisions lead from now on; gives its hash."""
        commit = Commit(dict(files))
        known = self.repositories.setdefault(repo, {})
        for revision in (*(revisions or ("main",)), commit.sha):
            known[revision] = commit
        return commit.sha

    def note(self, request: Request) -> None:
        with self._lock:
            key = request.method, request.path
            request.number = self._seen.get(key, 0)
            self._seen[key] = request.number + 1
            self.requests.append(request)

    def fetched(self, method: str = "GET") -> list[str]:
        """The files that were asked for, in order."""
        return [r.file for r in self.requests if r.file and r.method == method]

    def downloaded(self) -> list[str]:
        """The files that were asked for as a whole, in order."""
        return [r.file for r in self.requests if r.file and r.method == "GET" and r.range is None]


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, dict(self.headers.items()))
        found = re.fullmatch(r"/(?:stored/)?([^/]+/[^/]+)/resolve/([0-9a-f]{40}|[^/]+)/(.+)", path)
        if found and not path.startswith("/api/"):
            request.file = found[3]
        self.hub.note(request)
        if self.hub.fault(request, self):
            return
        if request.file and found:
            self._file(request, found[1], found[2])
        else:
            self._api(request)

    # what is said

    def say(self, status: int, data: Any = None, **headers: str) -> None:
        """Answer with JSON or bytes. Headers are given with ``_`` for ``-``."""
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(body)), **named}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.say(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def hang_up(self, status: int, sent: bytes, **headers: str) -> None:
        """Send the beginning of an answer, and break the connection."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(sent)
        self.wfile.flush()
        self.close_connection = True

    def _commit(self, repo: str, revision: str, *, file: bool = False) -> Commit | None:
        """The commit, or None where the answer was given."""
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo not in self.hub.repositories or (repo in self.hub.private and not allowed):
            self.refuse(404 if allowed else 401, "RepoNotFound")
        elif file and repo in self.hub.gated and not allowed:
            self.refuse(403, "GatedRepo")
        elif revision not in self.hub.repositories[repo]:
            self.refuse(404, "RevisionNotFound")
        else:
            return self.hub.repositories[repo][revision]
        return None

    def _api(self, request: Request) -> None:
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", request.path)
        commit = self._commit(found[1], found[3] or "main") if found else None
        if not found:
            self.refuse(404, "NoSuchPage")
        elif commit is not None and found[2] == "tree":
            listed = [{"type": "file", "path": name, "size": len(data), "oid": blob_of(data)}
                      for name, data in commit.files.items()]  # fmt: skip
            self.say(200, listed)
        elif commit is not None:
            files = [self._sibling(name, data) for name, data in commit.files.items()]
            self.say(200, {"id": found[1], "modelId": found[1], "sha": commit.sha,
                           "private": False, "siblings": files})  # fmt: skip

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        if self.hub.bare:
            return {"rfilename": name}
        said: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob_of(data)}
        if len(data) >= _LARGE:
            said["blobId"] = blob_of(b"version https://git-lfs")
            said["lfs"] = {"sha256": etag_of(data), "size": len(data), "pointerSize": 130}
        return said

    def _file(self, request: Request, repo: str, revision: str) -> None:
        stored = request.path.startswith("/stored/")
        commit = self.hub.repositories[repo][revision] if stored else self._commit(
            repo, revision, file=True
        )  # fmt: skip
        if commit is None:
            return
        data = commit.files.get(request.file)
        if data is None:
            self.refuse(404, "EntryNotFound")
            return
        common = {"ETag": f'"{etag_of(data)}"', "X_Repo_Commit": commit.sha}
        if stored:
            common = {"ETag": '"' + hashlib.md5(data).hexdigest() + '"'}
        elif self.hub.storage and len(data) >= _LARGE:
            linked = {"X_Linked_Etag": common.pop("ETag"), "X_Linked_Size": str(len(data))}
            target = f"{self.hub.storage}/stored{request.path}?signature=secret"
            self.say(302, b"", Location=target, **common, **linked)
            return
        if request.method == "HEAD" or request.range is None:
            self.say(200, data, Accept_Ranges="bytes", **common)
            return
        first, stop = request.range
        stop = min(stop, len(data))
        span = f"bytes {first}-{stop - 1}/{len(data)}"
        self.say(206, data[first:stop], Content_Range=span, **common)


@contextmanager
def serving(hub: Hub | None = None) -> Iterator[Hub]:
    """A hub that answers at its ``endpoint`` until the end."""
    hub = hub or Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def only_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client takes for the only one, an empty cache in ``folder``, no waiting."""
    import huggingface_hub.constants

    with serving() as hub:
        # what the client asks by itself goes there as well, and nowhere else
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        # other tests of this process may have imported the client with HF_HUB_OFFLINE set
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(folder / "home"))
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr("ckdiff.checkpoints.places.hub.retries._sleep", lambda seconds: None)
        impatient = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        for module in ("file_download", "utils._http"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", impatient)
        yield hub


def safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file."""
    header = safetensors_header(tensors)
    return len(header).to_bytes(8, "little") + header + b"".join(t[2] for t in tensors.values())


def sharded(shards: Mapping[str, Mapping[str, Tensor]]) -> dict[str, bytes]:
    """The files of a checkpoint with an index; file name -> tensors."""
    owner = {name: file for file, tensors in shards.items() for name in tensors}
    index = json.dumps({"metadata": {}, "weight_map": owner}).encode()
    files = {file: safetensors(tensors) for file, tensors in shards.items()}
    return {"model.safetensors.index.json": index, **files}
