"""Reads a data source: finds its files, and returns raw records and a digest of their content."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from tinyllama_lab.config.command import typed
from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.cache import file_digest
from tinyllama_lab.data.formats.cells import SPLIT_KEY, TRAIN, split_word
from tinyllama_lab.data.reading.decoding import COMPRESSED, DataFile, remedy_for
from tinyllama_lab.data.reading.readers import READERS
from tinyllama_lab.data.reading.unsupported import unsupported_kind
from tinyllama_lab.errors import DamagedError, DataError, EncodingError, shown
from tinyllama_lab.study.files import user_path

FORMATS = tuple(READERS)
SUFFIXES = tuple(suffix + packed for packed in ("", *COMPRESSED) for suffix in FORMATS)

# cached results and metadata that `datasets` writes next to its data files; neither holds rows
_CACHED = re.compile(r"cache-[0-9a-f]{16}(?:_\d+_of_\d+)?\.arrow")
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
_MAX_DAMAGED_SHOWN = 5  # files whose problems one error shows


def local_path(data: DataConfig) -> Path:
    """Return the file or folder of a local source."""
    if data.kind.package_file:
        return Path(__file__).parent / data.kind.package_file
    return user_path(str(data.path))


def load_rows(data: DataConfig) -> list[dict[str, Any]]:
    """Read every record of a local source.

    Raises:
        DataError: a file is missing or damaged, or contains no rows.
    """
    return _reader(data)(local_path(data), "data.path")


def load_held_out(data: DataConfig) -> list[dict[str, Any]] | None:
    """Read every record of `data.eval_path`; return None if it is not set.

    Raises:
        DataError: a file is missing or damaged, or contains no rows.
    """
    path = _eval_path(data)
    return None if path is None else _reader(data)(path, "data.eval_path")


def _reader(data: DataConfig) -> Callable[[Path, str], list[dict[str, Any]]]:
    """Return the function that reads a path of this kind of source."""
    if not data.kind.reader:
        return read_path
    module = import_module(f"tinyllama_lab.data.reading.{data.kind.reader}")
    read: Callable[[Path, str], list[dict[str, Any]]] = module.read_path
    return read


def content_digest(data: DataConfig) -> str:
    """Return sixteen hex digits of the content of a local source, with its held-out files.

    Raises:
        DataError: a file cannot be read.
    """
    training, path = path_digest(local_path(data)), _eval_path(data)
    if path is None:
        return training
    held_out = path_digest(path, "data.eval_path")
    return hashlib.sha256(f"{training} {held_out}".encode()).hexdigest()[:16]


def _eval_path(data: DataConfig) -> Path | None:
    return user_path(data.eval_path) if data.eval_path else None


def path_digest(path: Path, setting: str = "data.path") -> str:
    """Return sixteen hex digits of a file's content, or of the content and names in a folder.

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
            # surrogateescape: names on disk need not be UTF-8
            total.update(f"{name}\0{file_digest(file)}\0".encode("utf-8", "surrogateescape"))
        return total.hexdigest()[:16]


def read_path(path: Path, setting: str = "data.path") -> list[dict[str, Any]]:
    """Read a file, or every data file below a folder.

    If the names of a folder's files mark training and held-out files, as `datasets` names them,
    each record has the split of its file under `SPLIT_KEY`.

    Args:
        path: a file or folder.
        setting: the setting with this path, for messages.

    Raises:
        DataError: with the file, the line if there is one, and a remedy.
    """
    with _readable(path, setting):
        if not path.is_dir():
            return _read(DataFile(path, setting))
        files = _files_of(path, setting)
        splits = _splits_of(files, path)
        return _read_all([DataFile(file, setting, path) for file in files], splits)


def _read_all(files: Sequence[DataFile], splits: Sequence[str]) -> list[dict[str, Any]]:
    """Read the records of several files, each with the split of its file.

    Raises:
        DamagedError: lines of some files are damaged.
        DataError: a file cannot be read; with the problems of the first files.
    """
    records: list[dict[str, Any]] = []
    errors: list[DataError] = []
    for file, split in zip(files, splits, strict=True):
        try:
            rows = _read(file)
        except DataError as error:
            errors.append(error)
            rows = error.rows if isinstance(error, DamagedError) else []
        records += [{**row, SPLIT_KEY: split} if split else row for row in rows]
    if errors:
        more = len(errors) - _MAX_DAMAGED_SHOWN
        problems = [text for error in errors[:_MAX_DAMAGED_SHOWN] for text in error.problems]
        problems += [f"and {more} more files with problems"] if more > 0 else []
        if all(isinstance(error, DamagedError) for error in errors):
            raise DamagedError(records, *problems)
        raise DataError(*problems)
    return records


def read_file(path: Path) -> list[dict[str, Any]]:
    """Read one data file, compressed or not; numbers in JSON stay as they are written.

    Raises:
        DataError: with the line, if there is one, and a remedy.
    """
    return read_path(path)


def data_files(folder: Path) -> list[Path]:
    """Return every file below a folder that may contain rows, sorted by name.

    Raises:
        OSError: a folder in it cannot be read.
    """
    return [path for path in _data_paths(folder) if path.is_file()]


def _data_paths(folder: Path, is_wanted: Callable[[str], bool] | None = None) -> list[Path]:
    """Return the paths below a folder whose names are those of data files, or are wanted.

    Pipes and broken links are included, so that they can be reported. Links to folders are
    followed, but each folder is visited once. Hidden files and folders are ignored.
    """

    def refuse(error: OSError) -> None:
        raise error  # os.walk would skip the folder

    is_wanted = is_wanted or _may_hold_rows
    paths: list[Path] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        # in place: os.walk descends into what is left; a link upwards would never end
        folders[:] = [n for n in folders if not n.startswith(".") and real not in visited]
        if real not in visited:
            visited.add(real)
            paths += [Path(parent) / name for name in names if is_wanted(name)]
    return sorted(paths)


def _may_hold_rows(name: str) -> bool:
    is_hidden = name.startswith(".") or name in _METADATA or _CACHED.fullmatch(name)
    return not is_hidden and name.lower().endswith(SUFFIXES)


@contextmanager
def _readable(path: Path, setting: str) -> Iterator[None]:
    """Turn an error of the file system into a `DataError` that names the path and the setting."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        culprit = getattr(error, "filename", None) or path
        hint = _hint_for_missing(Path(culprit)) if isinstance(error, FileNotFoundError) else ""
        remedy = f"correct {setting}{hint}"
        if "://" in str(path) or ":/" in str(path):  # Path turns the two slashes of a URL into one
            remedy = "download it first, or take a set of the hub: data=hub data.repo=owner/name"
        raise DataError(
            f"{shown(str(culprit), 300)} must be a readable data file, got: {shown(reason)}; "
            f"{remedy}"
        ) from None


def _hint_for_missing(path: Path) -> str:
    """Return a hint with the existing file that was perhaps meant, or where the path starts."""
    names = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"; did you mean '{shown(str(path.with_name(close[0])), 300)}'?"
    folder = shown(str(Path.cwd()), 300)
    is_relative = not path.is_absolute()
    return f"; a relative path starts at the working folder {folder}" if is_relative else ""


def _read(file: DataFile) -> list[dict[str, Any]]:
    """Read the records of one file.

    Raises:
        DataError: it is not a data file, is empty, or cannot be read.
    """
    size = _check_regular(file.path, file.setting)
    if file.suffix not in READERS:
        raise _unknown(file)
    records = _records(file) if size else []
    if not records:
        remedy = f"correct {file.setting}" if file.folder is None else "remove it"
        raise DataError(
            f"{file} must hold at least one row, got {'none' if size else 'an empty file'}; "
            f"{remedy}"
        )
    return records


def _records(file: DataFile) -> list[dict[str, Any]]:
    """Read the records of a file, whatever its encoding problems.

    Raises:
        DamagedError: lines are damaged, or not UTF-8; such a line's text contains U+FFFD.
    """
    read = READERS[file.suffix]
    try:
        return read(file)
    except EncodingError as error:
        problems = error.problems
    # read again with replacement characters, so that the other problems are reported as well
    try:
        records = read(replace(file, errors="replace"))
    except DamagedError as error:
        records, problems = error.rows, [*problems, *error.problems]
    except DataError as error:
        raise DataError(*problems, *error.problems) from None
    raise DamagedError(records, *problems)


def _check_regular(path: Path, setting: str) -> int:
    """Return the size of a regular file.

    Raises:
        OSError: it does not exist.
        DataError: it is something else; reading a named pipe would never end.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise DataError(
            f"{shown(str(path), 300)} must be a data file or a folder, got no regular file; name "
            f"one in {setting}"
        )
    return size


def _unknown(file: DataFile) -> DataError:
    """Return the error for a file whose suffix is not one of a data file."""
    with file.path.open("rb") as stream:
        head = stream.read(512)
    # JSON under another name is data, whatever kind of file its suffix stands for
    is_json = re.match(rb'\s*(?:\{|\[\s*[\[{"\]])', head)
    kind = None if is_json else unsupported_kind(head, file.suffix)
    lines = str(file.path.with_suffix(".jsonl"))
    remedy = (
        remedy_for(file, kind)
        if kind
        else f"where each line is an object, type cp {shlex.quote(str(file.path))} "
        f"{shlex.quote(lines)} and set {typed(file.setting, lines)}; else write it as JSON lines"
    )
    description = f" ({kind.description})" if kind else ""
    return DataError(
        f"{file} must end in {', '.join(FORMATS)}, or one of these with {', '.join(COMPRESSED)}, "
        f"got {shown(file.suffix or file.compression)!r}{description}; {remedy}"
    )


def _files_of(folder: Path, setting: str) -> list[Path]:
    files = _data_paths(folder)
    if not files:
        raise _without_data(folder, setting)
    return files


def _without_data(folder: Path, setting: str) -> DataError:
    """Return the error for a folder without data files: what it contains, and what to do."""
    others = _data_paths(folder, lambda name: not name.startswith("."))
    suffixes = Counter(path.suffix.lower() for path in others)
    content = ", ".join(f"{n} {shown(name) or 'others'}" for name, n in suffixes.most_common(3))
    remedy = f"correct {setting}"
    usual = next(iter(suffixes.most_common(1)), ("", 0))[0]
    first = next((path for path in others if path.suffix.lower() == usual), folder)
    if kind := unsupported_kind(b"", usual):
        remedy = remedy_for(DataFile(first, setting, folder), kind)
    return DataError(
        f"{shown(str(folder), 300)} must hold data files ({', '.join(FORMATS)}), got a folder "
        f"without{f' ({content})' if content else ''}; {remedy}"
    )


def _splits_of(files: list[Path], folder: Path) -> list[str]:
    """Return the split of every file by its name, else its folder's; empty if no file is held out.

    Raises:
        DataError: some names contain a split, and others do not.
    """
    splits = []
    for file in files:
        parts = reversed(file.relative_to(folder).parts)
        splits.append(next((split for part in parts if (split := split_word(part))), ""))
    if set(splits) <= {"", TRAIN}:  # train.jsonl alone marks nothing: split by content
        return [""] * len(files)
    if "" in splits:
        without_split = files[splits.index("")]
        with_split = next(file for file, split in zip(files, splits, strict=True) if split)
        raise DataError(
            f"all files of {shown(str(folder), 300)} must say which split they are, got "
            f"{shown(with_split.name)} and {shown(without_split.name)}; rename the second, such "
            f"as train-{shown(without_split.name)}, or move it elsewhere"
        )
    return splits
