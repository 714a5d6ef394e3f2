"""Which code ran: the commit of this package's own checkout, and what was changed since."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
_TIMEOUT_S = 5
_DIGITS = 12


@cache
def code_facts(package: Path = PACKAGE) -> dict[str, Any]:
    """What a result records of the code, as it was when the process asked first.

    `git_diff` is a digest of what differs from the commit in the package's folder, files that git
    does not know yet included; null where nothing does. Everything is null where the package is
    not in a checkout of its own, such as an installed one.
    """
    facts: dict[str, Any] = {"git_commit": None, "git_dirty": None, "git_diff": None}
    if not _git(package, "ls-files", "--", "__init__.py"):
        return facts
    commit = _git(package, "rev-parse", "HEAD")
    diff = _git(package, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-color", "--", ".")
    names = _git(package, "ls-files", "--others", "--exclude-standard", "-z", "--", ".")
    if commit is None or diff is None or names is None:
        return facts
    new = [name for name in names.decode(errors="surrogateescape").split("\0") if name]
    try:
        digest = _digest(diff, package, new) if diff or new else None
    except OSError:  # a file that was removed since, or that nobody may read
        return facts
    return {
        "git_commit": commit.decode().strip(),
        "git_dirty": digest is not None,
        "git_diff": digest,
    }


def _digest(diff: bytes, package: Path, new: list[str]) -> str:
    """Of a diff, and of the files that are not part of it."""
    hasher = hashlib.sha256(diff)
    for name in new:
        content = hashlib.sha256((package / name).read_bytes()).hexdigest()
        hasher.update(f"\0{name}\0{content}".encode(errors="surrogateescape"))
    return hasher.hexdigest()[:_DIGITS]


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git says of a folder; None where there is no git or no checkout."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
