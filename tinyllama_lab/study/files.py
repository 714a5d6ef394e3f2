"""Files and folders that a user names: where a path leads, and whether it can be written to."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path


def user_path(text: str) -> Path:
    """A path as one types it; `~` is the home folder, and stays what it is where there is none."""
    return Path(os.path.expanduser(text))


def exists(text: str) -> bool:
    """Whether a typed path leads to something; a name that no disk can hold leads nowhere."""
    try:
        return bool(text) and user_path(text).exists()
    except (OSError, ValueError):  # too long, forbidden, or a NUL in it
        return False


def write_problem(folder: Path) -> str | None:
    """Why nothing can be written into a folder, which may be still to make; None where it can.

    Nothing stays behind, and no name is seen by others where the disk knows unnamed files.
    """
    wanted = place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    name = "it" if place == wanted else str(place)
    if not os.path.isdir(place):
        return f"{name} is {'a file' if os.path.exists(place) else 'a link that leads nowhere'}"
    missing = [os.fsencode(part) for part in wanted.relative_to(place).parts]
    try:
        if max(map(len, missing), default=0) > os.pathconf(place, "PC_NAME_MAX"):
            return "a name in it is too long"
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{name} cannot be written to ({error.strerror})"


def free_mib(folder: Path) -> int | None:
    """Free space where a folder is, or will be; None where the disk does not say."""
    place = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return None
    return usage.free // 2**20 if usage.total else None


def utf8_problem(text: str) -> str | None:
    """Why a name cannot be written down; None where it can: every file here is UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        if sys.getfilesystemencoding() != "utf-8":
            return f"{text!r} cannot be read in this locale; set PYTHONUTF8=1"
        return f"{text!r} must be in UTF-8; if a file has this name, rename it"
    return None
