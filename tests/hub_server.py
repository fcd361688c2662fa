"""A small hub on the loopback interface: the endpoints that huggingface_hub calls to fetch a repository.

Goes in: repositories as folders, and what is to go wrong. Comes out: an endpoint, a record of the requests.
Never does: leave this machine.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """One repository: its files, who may read them, and where a transfer breaks off."""

    folder: Path
    kind: str = "model"
    gated: bool = False
    token: str | None = None
    """The token that opens a gated repository."""
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """File name -> bytes after which the next transfers of it are cut, one entry for each."""


@dataclass
class Hub:
    """A running hub."""

    endpoint: str
    repositories: dict[str, Repository]
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header) in order."""
    claimed_bytes: dict[str, int] = field(default_factory=dict)
    """File name -> a size to claim instead of the true one, when asked before the transfer."""


@contextmanager
def running_hub(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serve repositories by id until the block ends."""
    hub = Hub(endpoint="", repositories=repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent; the requests are recorded."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:1] == ["api"]:
            self._api("dataset" if parts[1] == "datasets" else "model", "/".join(parts[2:4]), parts[4:])
        else:
            kind = "dataset" if parts[0] == "datasets" else "model"
            parts = parts[1:] if kind == "dataset" else parts
            self._file(kind, "/".join(parts[:2]), parts[3:4], "/".join(parts[4:]))

    def _repository(self, kind: str, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or repository.kind != kind:
            # the real hub does not tell a stranger which private repositories exist
            signed_in = "Authorization" in self.headers
            self._refuse(404 if signed_in else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def _api(self, kind: str, name: str, rest: list[str]) -> None:
        repository = self._repository(kind, name)
        if repository is None:
            return
        if rest[0] == "revision" and rest[1] in ("main", COMMIT):
            self._json(
                {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in _names(repository)]}
            )
        elif rest[0] == "tree" and rest[1] == COMMIT:
            claimed = self.hub.claimed_bytes
            self._json([_entry(repository, file, claimed.get(file)) for file in _names(repository)])
        else:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")

    def _file(self, kind: str, name: str, revision: list[str], file: str) -> None:
        repository = self._repository(kind, name)
        if repository is None:
            return
        if repository.gated and self.headers.get("Authorization") != f"Bearer {repository.token}":
            status = 403 if "Authorization" in self.headers else 401
            self._refuse(status, "GatedRepo", "Access to this model is restricted")
        elif revision not in (["main"], [COMMIT]):
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif file not in _names(repository):
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._content(repository, file)

    def _content(self, repository: Repository, file: str) -> None:
        content = (repository.folder / file).read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        claimed = self.hub.claimed_bytes.get(file) if self.command == "HEAD" else None
        self.send_header("Content-Length", str(claimed or len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = repository.cut_after.get(file)
        if cuts:
            self.wfile.write(content[start : start + cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _names(repository: Repository) -> list[str]:
    files = [file for file in repository.folder.rglob("*") if file.is_file()]
    return sorted(str(file.relative_to(repository.folder)) for file in files)


def _entry(repository: Repository, file: str, claimed: int | None) -> dict[str, Any]:
    content = (repository.folder / file).read_bytes()
    size = claimed or len(content)
    digest = hashlib.sha256(content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": file, "size": size, "oid": digest[:40]}
    if file.endswith(".safetensors"):
        entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
    return entry
