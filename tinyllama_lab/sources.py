"""Reads a data source: finds its files, and returns raw records and a digest of their content."""

from __future__ import annotations

import difflib
import hashlib
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyllama_lab.cache import file_digest
from tinyllama_lab.cells import SPLIT_KEY, TRAIN, split_word
from tinyllama_lab.command import typed
from tinyllama_lab.config import DataConfig
from tinyllama_lab.decoding import PACKED, DataFile
from tinyllama_lab.disk import user_path
from tinyllama_lab.errors import DataError, shown
from tinyllama_lab.readers import READERS

__all__ = ["FORMATS", "SUFFIXES", "content_digest", "data_files", "load_held_out", "load_rows"]
__all__ += ["local_path", "path_digest", "read_file", "read_path", "shown", "travel_file"]

FORMATS = tuple(READERS)
SUFFIXES = tuple(suffix + packed for packed in ("", *PACKED) for suffix in FORMATS)

_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
_ADVICE = {  # what to do with files of other kinds
    ".txt": "where it is a table, type cp {old} {tsv} and set {set_tsv}",
    ".xlsx": "in the spreadsheet program, save it as CSV (UTF-8)",
    ".xls": "in the spreadsheet program, save it as CSV (UTF-8)",
    ".ods": "in the spreadsheet program, save it as CSV (UTF-8)",
    ".zst": "type zstd -d {old} and set {set_stem}",
    ".zip": "type unzip {old} and name what comes out in {setting}",
    ".tar": "type tar -xf {old} and name what comes out in {setting}",
    ".tgz": "type tar -xf {old} and name what comes out in {setting}",
}


def travel_file() -> Path:
    """The travel data set, which is part of the package."""
    return Path(__file__).parent / "travel" / "travel.jsonl"


def local_path(data: DataConfig) -> Path:
    """The file or folder of a source that is on this machine.

    Raises:
        DataError: `data=file` without a path.
    """
    if data.source == "travel":
        return travel_file()
    if not data.path:
        raise DataError("data.path must name a file, got null; set data.path=my.jsonl")
    return user_path(data.path)


def load_rows(data: DataConfig) -> list[dict[str, Any]]:
    """Read every record of a local source.

    Raises:
        DataError: a file is missing, damaged or holds no rows.
    """
    return read_path(local_path(data))


def load_held_out(data: DataConfig) -> list[dict[str, Any]] | None:
    """Read every record of `data.eval_path`; None where it is not set.

    Raises:
        DataError: a file is missing, damaged or holds no rows.
    """
    path = _eval_path(data)
    return None if path is None else read_path(path, "data.eval_path")


def content_digest(data: DataConfig) -> str:
    """Sixteen hex digits for the content of a local source, its held-out files included."""
    found, path = path_digest(local_path(data)), _eval_path(data)
    if path is None:
        return found
    other = path_digest(path, "data.eval_path")
    return hashlib.sha256(f"{found} {other}".encode()).hexdigest()[:16]


def _eval_path(data: DataConfig) -> Path | None:
    return user_path(data.eval_path) if data.eval_path else None


def path_digest(path: Path, setting: str = "data.path") -> str:
    """Sixteen hex digits: of a file its content, of a folder every data file's content and name.

    Raises:
        DataError: it cannot be read.
    """
    with _readable(path, setting):
        files = _files_of(path, setting) if path.is_dir() else [path]
        for file in files:
            _check_regular(file, setting)
        if files == [path]:
            return file_digest(path)[:16]
        total = hashlib.sha256()
        for file in files:
            name = file.relative_to(path).as_posix()
            total.update(f"{name}\0{file_digest(file)}\0".encode("utf-8", "surrogateescape"))
        return total.hexdigest()[:16]


def read_path(path: Path, setting: str = "data.path") -> list[dict[str, Any]]:
    """Read a file, or every data file below a folder; `setting` is what named it.

    In a folder with files for training and for holding out, as `datasets` names them, each
    record has the split of its file under `SPLIT_KEY`.

    Raises:
        DataError: with the file and the line, where there is one, and a way out.
    """
    with _readable(path, setting):
        if not path.is_dir():
            return _read(DataFile(path, setting))
        files = _files_of(path, setting)
        splits = _splits_of(files, path)
        return [
            {**record, SPLIT_KEY: split} if split else record
            for file, split in zip(files, splits, strict=True)
            for record in _read(DataFile(file, setting, path))
        ]


def read_file(path: Path) -> list[dict[str, Any]]:
    """Read one data file, packed or not; numbers in JSON stay as written.

    Raises:
        DataError: with the line, where there is one, and a way out.
    """
    return read_path(path)


def data_files(folder: Path) -> list[Path]:
    """Every file below a folder that may hold rows, by name.

    Raises:
        OSError: a folder in it cannot be read.
    """
    return [path for path in _data_paths(folder) if path.is_file()]


def _data_paths(folder: Path) -> list[Path]:
    """What the names say are data files, pipes and broken links included.

    Links to folders are followed, each folder is visited once. Hidden files do not count.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    visited: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [n for n in folders if not n.startswith(".") and real not in visited]
        if real not in visited:
            visited.add(real)
            found += [Path(place) / name for name in names if _may_hold_rows(name)]
    return sorted(found)


def _may_hold_rows(name: str) -> bool:
    is_hidden = name.startswith(".") or name in _METADATA
    return not is_hidden and name.lower().endswith(SUFFIXES)


@contextmanager
def _readable(path: Path, setting: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        place = getattr(error, "filename", None) or path
        near = _nearest_name(Path(place)) if isinstance(error, FileNotFoundError) else ""
        way_out = f"correct {setting}{near}"
        if "://" in str(path) or ":/" in str(path):
            way_out = "download it first, or take a set of the hub: data=hub data.repo=owner/name"
        raise DataError(
            f"{shown(str(place), 300)} must be a readable data file, got: {shown(reason)}; "
            f"{way_out}"
        ) from None


def _nearest_name(path: Path) -> str:
    """The file that is there and was perhaps meant."""
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean '{shown(str(path.with_name(close[0])), 300)}'?" if close else ""


def _read(file: DataFile) -> list[dict[str, Any]]:
    size = _check_regular(file.path, file.setting)
    if file.suffix not in READERS:
        raise DataError(
            f"{file} must end in {', '.join(FORMATS)}, or one of these with "
            f"{', '.join(PACKED)}, got {shown(file.path.suffix)!r}; {_advice(file)}"
        )
    records = READERS[file.suffix](file) if size else []
    if not records:
        way_out = f"correct {file.setting}" if file.folder is None else "remove it"
        raise DataError(f"{file} must hold at least one row, got an empty file; {way_out}")
    return records


def _check_regular(path: Path, setting: str) -> int:
    """The size of a file; a named pipe would be waited for without end."""
    size = path.stat().st_size  # says so where there is nothing
    if not path.is_file():
        raise DataError(
            f"{shown(str(path), 300)} must be a data file or a folder, got no regular file; name "
            f"one in {setting}"
        )
    return size


def _advice(file: DataFile) -> str:
    advice = _ADVICE.get(file.path.suffix.lower(), "convert it, for example to .jsonl")
    table = str(file.path.with_suffix(".tsv"))
    return advice.format(
        old=shlex.quote(str(file.path)),
        tsv=shlex.quote(table),
        set_tsv=typed(file.setting, table),
        set_stem=typed(file.setting, str(file.path.with_suffix(""))),
        setting=file.setting,
    )


def _files_of(folder: Path, setting: str) -> list[Path]:
    files = _data_paths(folder)
    if not files:
        raise DataError(
            f"{shown(str(folder), 300)} must hold data files ({', '.join(FORMATS)}), got a folder "
            f"without; correct {setting}"
        )
    return files


def _splits_of(files: list[Path], folder: Path) -> list[str]:
    """The split of every file, by its name or else its folder's; none where none is held out.

    Raises:
        DataError: the names of some files say a split, and those of others do not.
    """
    splits = []
    for file in files:
        parts = reversed(file.relative_to(folder).parts)
        splits.append(next((split for part in parts if (split := split_word(part))), ""))
    if set(splits) <= {"", TRAIN}:
        return [""] * len(files)
    if "" in splits:
        unnamed, named = (
            files[splits.index("")],
            next(file for file, split in zip(files, splits, strict=True) if split),
        )
        raise DataError(
            f"all files of {shown(str(folder), 300)} must say which split they are, got "
            f"{shown(named.name)} and {shown(unnamed.name)}; rename the second, such as "
            f"train-{shown(unnamed.name)}, or move it elsewhere"
        )
    return splits
