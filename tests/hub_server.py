"""A Hugging Face hub on loopback, for the client of huggingface_hub exactly as it is installed.

It answers what the client asks: information on a repository, its files, and `resolve` with the
headers and redirects of the real hub. Large files come from a second server, which stands for
the hub's CDN. `HubServer.faults` makes chosen requests fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_uploads import LARGE, UPLOADS, Uploads, answer_upload, git_digest, sha256

TOKEN = "hf_right"  # the one that may read and write every repository
PAGE = 3  # files that one answer of the tree lists
_API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/(.+))?)?")
_RESOLVE = re.compile(r"(?:/(dataset)s)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_CACHED = re.compile(r"/api/resolve-cache/(model|dataset)s/([^/]+/[^/]+)/([^/]+)/(.+)")


@dataclass
class Repository:
    """A repository of the hub: its files at each commit, and its branches and tags."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False

    def commit(self, revision: str) -> str | None:
        """Return the commit of a branch, tag or commit; None if there is none."""
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Fault:
    """What happens to some requests instead of the right answer.

    Args:
        status: the status of the answer; None cuts the connection in the middle of the file.
        skips: how many requests get the right answer before.
        times: how many requests fail; those after them get the right answer.
        sent: the bytes of the file that arrive before a cut.
        is_reset: whether the cut is an abortive one (RST), not an orderly end.
        damages: whether the answer is right but for its first byte.
    """

    path: str
    method: str = "GET"
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    skips: int = 0
    times: int = 1
    sent: int = 0
    is_reset: bool = False
    damages: bool = False


@dataclass(frozen=True)
class Request:
    """A request that the server has received."""

    method: str
    path: str
    range: str | None
    token: str | None
    at: float  # seconds of time.monotonic


class HubServer:
    """The hub and its CDN, each on a port of its own."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._scheme = "https" if tls else "http"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.uploads = Uploads()
        self.sent: dict[str, int] = {}  # bytes of each file that were sent, by path
        self._lock = threading.Lock()
        self._servers = [_Server(self, is_cdn) for is_cdn in (False, True)]
        if tls:
            hub = self._servers[0]
            hub.socket = tls.wrap_socket(hub.socket, server_side=True)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        """Return the value of `HF_ENDPOINT`."""
        return f"{self._scheme}://127.0.0.1:{self._servers[0].server_port}"

    @property
    def cdn(self) -> str:
        """Return the address of the CDN; its origin is not the hub's."""
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def add(
        self, kind: str, name: str, files: dict[str, bytes], ref: str = "main", **options: Any
    ) -> str:
        """Add a commit, to which a branch moves; return the commit's name."""
        digest = hashlib.sha1(kind.encode() + name.encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commit = digest.hexdigest()
        repository = self.repositories.setdefault((kind, name), Repository({}, {}, **options))
        repository.commits[commit] = files
        repository.refs[ref] = commit
        return commit

    def commit(self, kind: str, name: str) -> str:
        """Return the commit of the branch `main`."""
        return self.repositories[kind, name].refs["main"]

    def fault(self, request: Request) -> Fault | None:
        """Note a request; return the fault that it meets."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                is_meant = fault.method == request.method and request.path.endswith(fault.path)
                if is_meant and fault.skips > 0:
                    fault.skips -= 1
                elif is_meant and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def count(self, path: str, size: int) -> None:
        """Count the bytes of a file that were sent."""
        name = path.rsplit("/", 1)[-1]
        with self._lock:
            self.sent[name] = self.sent.get(name, 0) + size

    def asked(self, method: str, ending: str) -> list[Request]:
        """Return the requests whose path ends like this, in their order."""
        return [r for r in self.requests if r.method == method and r.path.endswith(ending)]

    def close(self) -> None:
        """Stop both servers, so that connections are refused."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, is_cdn: bool) -> None:
        self.hub, self.is_cdn = hub, is_cdn
        super().__init__(("127.0.0.1", 0), _Handler)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection at once; an orderly shutdown would precede a reset."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing where a client has gone."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets, 40 ms apart otherwise
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_CONNECT(self) -> None:
        """Refuse a tunnel, as a proxy that wants a password does."""
        self._head(407, {}, 0)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self._fault = self.server.hub.fault(
            Request(self.command, path, self.headers["Range"], token, time.monotonic())
        )
        if self._fault and self._fault.status is not None:
            self._answer(self._fault.status, {"error": "a fault"}, self._fault.headers)
        elif self.command in UPLOADS:
            self._upload(path, body, token)
        elif path.startswith("/portal/"):
            self._head(200, {"Content-Type": "text/html"}, 0)
        elif self.server.is_cdn:
            self._from_cdn(path)
        elif match := _API.fullmatch(path):
            self._from_api(match[1], match[2], match[3] or "revision", match[4], token)
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match[1] or "model", match[2], match[3], match[4], token)
        elif match := _CACHED.fullmatch(path):
            self._small(match[1], match[2], match[3], match[4])
        else:
            self._answer(404, {"error": "Not Found"})

    def _upload(self, path: str, body: bytes, token: str | None) -> None:
        """Answer a step of an upload; a right token may write, other known ones may only read."""
        hub = self.server.hub
        if not self.server.is_cdn and token != TOKEN:
            status = 403 if token == "hf_other" else 401
            self._answer(status, {"error": "you may not write here"})
            return
        status, answer = answer_upload(hub.uploads, (hub.url, hub.cdn), path, body)
        if path == "/api/repos/create":
            made = hub.uploads.made[-1]
            if ("model", made["full"]) not in hub.repositories:
                hub.add("model", made["full"], {}, private=made["visibility"] == "private")
        if status == 200 and (match := _API.fullmatch(path)) and match[3] == "commit":
            hub.add("model", match[2], hub.uploads.commits[-1])
        self._answer(status, answer)

    def _open(self, kind: str, name: str, token: str | None, reads: bool) -> Repository | None:
        """Return a repository; None after a refusal was sent."""
        repository = self.server.hub.repositories.get((kind, name))
        if token not in (None, TOKEN, "hf_other"):
            message = "Invalid credentials in Authorization header"
            self._answer(401, {"error": message}, {"X-Error-Message": message})
        elif repository is None or (repository.private and token != TOKEN):
            # the real hub tells nobody without a token whether a repository exists
            status = 401 if token is None else 404
            self._answer(status, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        elif repository.gated and reads and token != TOKEN:
            message = f"Access to {kind} {name} is restricted."
            status = 401 if token is None else 403
            self._answer(status, {"error": message}, {"X-Error-Code": "GatedRepo"})
        else:
            return repository
        return None

    def _from_api(
        self, kind: str, name: str, call: str, revision: str | None, token: str | None
    ) -> None:
        repository = self._open(kind, name, token, reads=call != "revision")
        if repository is None:
            return
        if call == "auth-check":
            self._answer(200, {})
            return
        revision, folder = revision or "main", ""
        if call == "tree":
            revision, _, folder = revision.partition("/")
        commit = repository.commit(revision)
        if commit is None:
            error = {"error": f"Invalid rev id: {revision}"}
            self._answer(404, error, {"X-Error-Code": "RevisionNotFound"})
            return
        files = repository.commits[commit]
        if call == "tree" and folder and not any(path.startswith(folder) for path in files):
            self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return
        if call == "tree":
            self._tree({path: files[path] for path in files if path.startswith(folder)})
            return
        self._answer(
            200,
            {
                "_id": "0",
                "id": name,
                "sha": commit,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            },
        )

    def _tree(self, files: dict[str, bytes]) -> None:
        """Answer with one page of the files and folders."""
        query = parse_qs(urlsplit(self.path).query)
        folders = {path.rsplit("/", 1)[0] for path in files if "/" in path}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "oid": git_digest(b""), "size": 0}
            for path in sorted(folders)
        ]
        for path, content in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(content)}
            if path.endswith(LARGE):
                pointer = f"oid sha256:{sha256(content)}".encode()
                lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
                entries.append({**entry, "oid": git_digest(pointer), "lfs": lfs})
            else:
                entries.append({**entry, "oid": git_digest(content)})
        start = int(query.get("cursor", ["0"])[0])
        end = start + PAGE
        next_page = f"{self.server.hub.url}{urlsplit(self.path).path}?cursor={end}"
        more = {"Link": f'<{next_page}>; rel="next"'} if end < len(entries) else {}
        self._answer(200, entries[start:end], more)

    def _resolve(self, kind: str, name: str, revision: str, path: str, token: str | None) -> None:
        """Redirect to the CDN, or for small files to a relative address, as the real hub does."""
        repository = self._open(kind, name, token, reads=True)
        if repository is None:
            return
        commit = repository.commit(revision)
        if commit is None:
            self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
            return
        content = repository.commits[commit].get(path)
        if content is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self._answer(404, {"error": "Entry not found"}, headers)
            return
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path.endswith(LARGE):
            headers["X-Linked-Size"] = str(len(content))
            headers["X-Linked-ETag"] = f'"{sha256(content)}"'
            headers["Location"] = f"{self.server.hub.cdn}/{kind}/{name}/{commit}/{path}"
            self._answer(302, {}, headers)
            return
        headers["Location"] = f"/api/resolve-cache/{kind}s/{name}/{commit}/{path}"
        self._answer(307, {}, headers)

    def _small(self, kind: str, name: str, commit: str, path: str) -> None:
        content = self.server.hub.repositories[kind, name].commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_digest(content)}"'}
        self._content(path, content, headers)

    def _from_cdn(self, path: str) -> None:
        kind, owner, name, commit, file = path.removeprefix("/").split("/", 4)
        content = self.server.hub.repositories[kind, f"{owner}/{name}"].commits[commit][file]
        self._content(path, content, {"ETag": f'"{sha256(content)}"'})

    def _content(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the range of it that is asked for, unless a fault cuts it."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        begin = int(match[1]) if match else 0
        status, body = (206, content[begin:]) if match else (200, content)
        if match:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._head(status, {**headers, "Accept-Ranges": "bytes"}, len(body))
        if self.command == "HEAD":
            return
        fault = self._fault
        if fault and fault.damages:
            body = bytes([body[0] ^ 1]) + body[1:]
        elif fault:
            body = body[: fault.sent]
        self.wfile.write(body)
        self.server.hub.count(path, len(body))
        if fault and not fault.damages:
            self._cut(fault)

    def _cut(self, fault: Fault) -> None:
        self.close_connection = True
        self.wfile.flush()
        if fault.is_reset:
            time.sleep(0.3)  # a reset discards what the client has not read yet
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self._head(status, {"Content-Type": "application/json", **(headers or {})}, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def hub_environment(home: Path, endpoint: str, **variables: str) -> dict[str, str]:
    """Return the environment of a machine whose hub is at `endpoint`, its cache below `home`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "SSL_CERT"))
        and not name.lower().endswith("_proxy")
    }
    root = str(Path(__file__).parents[1])
    return {**kept, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": root, **variables}


@contextmanager
def hub_server(tls: ssl.SSLContext | None = None) -> Iterator[HubServer]:
    """Serve until the block ends; with `tls`, the hub itself by https."""
    server = HubServer(tls)
    try:
        yield server
    finally:
        server.close()
