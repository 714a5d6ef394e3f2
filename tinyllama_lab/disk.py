"""Files and folders that a user names: where a path leads, and whether it can be written to."""

from __future__ import annotations

import os
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
    place = folder.absolute()
    try:
        place.lstat()
    except FileNotFoundError:
        pass  # to be made
    except NotADirectoryError:
        pass  # a file on the way: found below
    except (OSError, ValueError) as error:
        return _reason(error)
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        kind = "a link that leads nowhere" if place.is_symlink() else "a file"
        return f"{place} is {kind}" if place != folder.absolute() else f"it is {kind}"
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return _reason(error) if place == folder.absolute() else f"{place}: {_reason(error)}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
