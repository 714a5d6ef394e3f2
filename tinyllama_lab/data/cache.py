"""The user's cache: folders that are made once, and digests of large files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from tinyllama_lab.errors import CacheError
from tinyllama_lab.study.files import write_problem
from tinyllama_lab.study.trial import sync, write_atomic

_LARGE = 2**24  # bytes: reading less than this is as fast as looking a digest up


TINY_RANDOM = "tiny_random-1"  # folders that `made_once` makes
SMOLLM2 = "smollm2-135m-instruct-{version}"


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/tinyllama_lab`, else `~/.cache/tinyllama_lab`.

    Raises:
        CacheError: neither the variable nor the user's home folder is known.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):
        raise CacheError(
            "the cache needs a folder, and neither XDG_CACHE_HOME nor a home folder is there; "
            "set XDG_CACHE_HOME=/a/folder"
        )
    return Path(root) / "tinyllama_lab"


def check_writable() -> None:
    """Raise `CacheError` where nothing can be kept in the cache."""
    folder = cache_dir()
    if problem := write_problem(folder):
        variable = "XDG_CACHE_HOME" if os.environ.get("XDG_CACHE_HOME") else "HOME"
        raise CacheError(
            f"the cache must be a folder that can be written to, got {folder} (from {variable}): "
            f"{problem}; set XDG_CACHE_HOME=/another/folder"
        )


def check_can_make(name: str) -> None:
    """Raise `CacheError` where the folder `name` is neither in the cache nor can be made there."""
    if not os.path.isdir(cache_dir() / name):
        check_writable()


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached folder `name`; `make` fills a new one, which appears whole or not at all.

    Raises:
        CacheError: it is not there and cannot be made.
    """
    check_can_make(name)
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
    try:
        digests = cache_dir() / "digests"
    except CacheError:
        return _sha256(path)
    place = str(path.resolve())
    known = {"path": place, "size": facts.st_size, "time_ns": facts.st_mtime_ns}
    memo = digests / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.json"
    try:
        found = json.loads(memo.read_text(encoding="utf-8"))
        digest = str(found.pop("sha256"))
        if found == known:
            return digest
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # not remembered yet, or damaged: read the file
    digest = _sha256(path)
    with contextlib.suppress(OSError):  # a shortcut for the next time: it can be done without
        write_atomic(memo, json.dumps({**known, "sha256": digest}))
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
