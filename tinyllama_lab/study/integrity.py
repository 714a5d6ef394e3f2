"""What a result records of the files it rests on, and whether they are still the same.

A result names size and SHA-256 of each file. To hash every adapter of a study whenever a command
looks at it would be slow, so a file is hashed again only when its `stat` differs from what it was
at the last check, which `.verified` keeps beside the result.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from tinyllama_lab.study.files import open_file, read_file, write_atomic

MEMO = ".verified"
GROWS = "grows"  # marks a file that is only appended to: what was written until then must stay
FileRecord = int | dict[str, Any]  # earlier versions recorded the size alone


def record_files(
    folder: Path, paths: Iterable[Path], growing: Iterable[Path] = ()
) -> dict[str, FileRecord]:
    """Return the record of each existing file, and remember that they are as recorded.

    Args:
        folder: of the result.
        paths: files below it.
        growing: files to which more will be appended.
    """
    records: dict[str, FileRecord] = {}
    grows = dict.fromkeys(paths, False) | dict.fromkeys(growing, True)
    for path in sorted(path for path in grows if path.is_file()):
        size = path.stat().st_size
        record = {"bytes": size, "sha256": _sha256(path, size)}
        name = str(path.relative_to(folder))
        records[name] = record | {GROWS: True} if grows[path] else record
    _remember(folder, {name: _signature(folder / name) for name in records})
    return records


def problem(folder: Path, records: Mapping[str, FileRecord]) -> str | None:
    """Return what is wrong with a result's files; None if they are as recorded."""
    known = _read_memo(folder)
    checked = {}
    for name, record in records.items():
        path = folder / name
        try:
            signature = _signature(path)
        except OSError:
            return f"{path} is missing"
        if signature is None:
            return f"{path} is not a file"
        size = record["bytes"] if isinstance(record, dict) else record
        grows = isinstance(record, dict) and record.get(GROWS)
        if signature[0] < size or (signature[0] > size and not grows):
            return f"{path} has {signature[0]} bytes, and the result names {size}"
        if isinstance(record, dict) and known.get(name) != signature:
            try:
                digest = _kept_sha256(path, size, tuple(signature))
            except OSError as error:
                return f"{path} cannot be read ({error})"
            if digest != record["sha256"]:
                return f"{path} was changed after the result was written"
            checked[name] = signature
    if checked:
        _remember(folder, known | checked)
    return None


def _signature(path: Path) -> list[int] | None:
    """Return what changes with every change of a file; None if the path is not a file."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):  # to open a pipe would wait for ever
        return None
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


@lru_cache(maxsize=2**17)  # a command looks at a result several times, and may keep no memo
def _kept_sha256(path: Path, size: int, signature: tuple[int, ...]) -> str:
    return _sha256(path, size)


def _sha256(path: Path, size: int) -> str:
    """Return the SHA-256 of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _read_memo(folder: Path) -> dict[str, list[int] | None]:
    try:
        memo = json.loads(read_file(folder / MEMO))
    except (OSError, ValueError, RecursionError):  # then all files are hashed
        return {}
    return memo if isinstance(memo, dict) else {}


def _remember(folder: Path, signatures: Mapping[str, list[int] | None]) -> None:
    """Keep what was checked. It may get lost, and a study of others may be read-only."""
    with suppress(OSError):
        write_atomic(folder / MEMO, json.dumps(signatures), is_durable=False)
