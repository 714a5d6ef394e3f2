"""The user's cache: folders that are made once, and digests of large files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from tinyllama_lab.trial import sync, write_atomic

_LARGE = 2**24  # bytes: reading less than this is as fast as looking a digest up


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/tinyllama_lab`, else `~/.cache/tinyllama_lab`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tinyllama_lab"


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached folder `name`; `make` fills a new one, which appears whole or not at all."""
    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        for leftover in folder.parent.glob(f".{name}-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        if not folder.is_dir():
            temporary = folder.with_name(f".{name}-{uuid.uuid4().hex[:8]}")
            try:
                make(temporary)
                for file in temporary.iterdir():
                    sync(file)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def file_digest(path: Path) -> str:
    """SHA-256 of a file; of a large one it is remembered by path, size and time of change."""
    facts = path.stat()
    if facts.st_size < _LARGE:
        return _sha256(path)
    place = str(path.resolve())
    known = {"path": place, "size": facts.st_size, "time_ns": facts.st_mtime_ns}
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    memo = cache_dir() / "digests" / f"{name}.json"
    try:
        found = json.loads(memo.read_text(encoding="utf-8"))
        digest = str(found.pop("sha256"))
        if found == known:
            return digest
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # not remembered yet, or damaged: read the file
    digest = _sha256(path)
    write_atomic(memo, json.dumps({**known, "sha256": digest}))
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
