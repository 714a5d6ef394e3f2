"""Folders that are made once and kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


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
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            temporary = folder.with_name(f".{name}-{uuid.uuid4().hex[:8]}")
            try:
                make(temporary)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder
