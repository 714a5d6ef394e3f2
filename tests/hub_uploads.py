"""The half of a hub that takes uploads: a repository is made, files arrive, a commit joins them.

A small file travels inside the commit; a large one goes to the CDN first, by its SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

UPLOADS = ("POST", "PUT")
LARGE = (".safetensors", ".bin", ".model", ".jsonl", ".parquet")  # as in .gitattributes
_PREUPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/preupload/main")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_STORE = re.compile(r"/lfs/([0-9a-f]{64})")
_COMMIT = re.compile(r"/api/models/([^/]+/[^/]+)/commit/main")


@dataclass
class Uploads:
    """What arrived."""

    made: list[dict[str, Any]] = field(default_factory=list)  # requests for new repositories
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    commits: list[dict[str, bytes]] = field(default_factory=list)  # files by path


def answer_upload(
    uploads: Uploads, urls: tuple[str, str], path: str, body: bytes
) -> tuple[int, Any]:
    """Take one step of an upload to a hub and its CDN; return status and answer."""
    hub, cdn = urls
    if match := _STORE.fullmatch(path):
        is_whole = sha256(body) == match[1]
        uploads.stored |= {match[1]: body} if is_whole else {}
        return 200 if is_whole else 400, {}
    if match := _COMMIT.fullmatch(path):
        return _commit(uploads, f"{hub}/{match[1]}", body)
    request = json.loads(body)
    if path == "/api/repos/create":
        name = f"{request['organization']}/{request['name']}"
        is_new = name not in [made["full"] for made in uploads.made]
        uploads.made.append({**request, "full": name})
        return 200 if is_new else 409, {"url": f"{hub}/{name}", "id": name, "name": name}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if _PREUPLOAD.fullmatch(path):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in request["files"]
        ]
        return 200, {"files": files}
    if _BATCH.fullmatch(path):
        objects = [
            {**each, "actions": {"upload": {"href": f"{cdn}/lfs/{each['oid']}"}}}
            for each in request["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}
    return 404, {"error": "Not Found"}


def _commit(uploads: Uploads, url: str, body: bytes) -> tuple[int, Any]:
    """Join the lines of a commit, one JSON object each."""
    files: dict[str, bytes] = {}
    for line in map(json.loads, body.decode().splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in uploads.stored:
                return 400, {"error": "a large file is not here yet"}
            files[value["path"]] = uploads.stored[value["oid"]]
    uploads.commits.append(files)
    oid = hashlib.sha1(body).hexdigest()
    return 200, {"commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}


def sha256(content: bytes) -> str:
    """Return the digest by which the hub names a large file."""
    return hashlib.sha256(content).hexdigest()


def git_digest(content: bytes) -> str:
    """Return the name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
