"""Reads a data source: finds its files, checks their bytes, and returns raw records.

Standard library only; pyarrow is imported where a Parquet file is met.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinyllama_lab.cache import file_digest
from tinyllama_lab.config import DataConfig
from tinyllama_lab.errors import DataError

SUFFIXES = (".parquet", ".jsonl", ".csv", ".json")  # in the order a snapshot prefers them

_METADATA = ("dataset_infos.json", "dataset_dict.json", "state.json")


def travel_file() -> Path:
    """The travel data set, which is part of the package."""
    return Path(__file__).parent / "travel" / "travel.jsonl"


def local_file(data: DataConfig) -> Path:
    """The file of a source that is on this machine.

    Raises:
        DataError: `data=file` without a path.
    """
    if data.source == "travel":
        return travel_file()
    if not data.path:
        raise DataError("data.path must name a file, got null; set data.path=my.jsonl")
    return Path(data.path).expanduser()


def load_rows(data: DataConfig) -> list[dict[str, Any]]:
    """Read every record of a local source.

    Raises:
        DataError: the file is missing, damaged or holds no rows.
    """
    return read_file(local_file(data))


def load_held_out(data: DataConfig) -> list[dict[str, Any]] | None:
    """Read every record of `data.eval_path`; None where it is not set.

    Raises:
        DataError: the file is missing, damaged or holds no rows.
    """
    path = _eval_file(data)
    try:
        return None if path is None else read_file(path)
    except DataError as error:  # its remedy is for the other file
        raise DataError(
            *(p.replace("data.path", "data.eval_path") for p in error.problems)
        ) from None


def content_digest(data: DataConfig) -> str:
    """Sixteen hex digits for the content of a local source, its held-out file included."""
    path = _eval_file(data)
    found = file_digest(local_file(data))
    if path is not None:
        found = hashlib.sha256(f"{found} {file_digest(path)}".encode()).hexdigest()
    return found[:16]


def _eval_file(data: DataConfig) -> Path | None:
    return Path(data.eval_path).expanduser() if data.eval_path else None


def read_file(path: Path) -> list[dict[str, Any]]:
    """Read one `.jsonl`, `.json`, `.csv` or `.parquet` file; numbers in JSON stay as written.

    Raises:
        DataError: with the line, where there is one, and a way out.
    """
    try:
        read = _reader(path)
        records = read(path) if path.stat().st_size else []
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"{path} must be a readable data file, got: {shown(reason)}; correct data.path"
        ) from None
    if not records:
        raise DataError(f"{path} must hold at least one row, got an empty file; correct data.path")
    return records


def data_files(folder: Path) -> list[Path]:
    """Every file below a snapshot folder that may hold rows, by name."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(
        path
        for path in found
        if path.is_file()
        and path.name not in _METADATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def shown(text: str, limit: int = 80) -> str:
    """The head of a foreign text, fit for a terminal: control characters are escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit]
    )


def _reader(path: Path) -> Callable[[Path], list[dict[str, Any]]]:
    path.stat()  # says so where there is nothing
    if not path.is_file():  # a named pipe would be waited for without end
        kind = "a folder" if path.is_dir() else "no regular file"
        raise DataError(f"{path} must be a data file, got {kind}; name one file in data.path")
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"{path} must end in {', '.join(_READERS)}, got {path.suffix!r}; convert it, or "
            "unpack it where it is compressed"
        )
    return _READERS[path.suffix.lower()]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Every line and its number. Only LF ends a line: U+2028 and CR are part of the text."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith(codecs.BOM_UTF8):
                offset, raw = len(codecs.BOM_UTF8), raw.removeprefix(codecs.BOM_UTF8)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} must be UTF-8 text, got the byte 0x{raw[error.start]:02x} at byte "
                    f"offset {offset + error.start} (line {number}); convert it, for example with "
                    "iconv -t UTF-8, or unpack it where it is compressed"
                ) from None
            if "\0" in text:
                raise DataError(
                    f"{path} line {number} must be text, got a NUL byte; convert the file to "
                    "UTF-8 or write it again"
                )
            offset += len(raw)
            yield number, text


def _parse(text: str, path: Path, first_line: int, way_out: str) -> Any:
    try:
        # numbers become text anyway; as written, none is too long to convert or becomes inf
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except RecursionError:
        raise DataError(
            f"{path} line {first_line} must be a flat object, got one that is nested too deeply; "
            "remove or flatten it"
        ) from None
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1].strip()
        raise DataError(
            f"{path} line {first_line + error.lineno - 1} must be valid JSON, got '{shown(line)}' "
            f"({error.msg}, column {error.colno}); {way_out}"
        ) from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a text or number", bool: "true or false"}.get(type(value))
        raise DataError(
            f"{place} must be an object of columns, got {kind or 'null'}; write "
            '{"prompt": "...", "response": "..."}'
        )
    return value


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    way_out = "correct or remove the line"
    return [
        _object(_parse(text.rstrip("\r\n"), path, number, way_out), f"{path} line {number}")
        for number, text in _lines(path)
        if text.strip()
    ]


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = "".join(text for _, text in _lines(path))
    if not text.strip():
        return []
    top = _parse(text, path, 1, "correct it, or name it .jsonl where each line is one object")
    if not isinstance(top, list):
        raise DataError(
            f"{path} must hold an array of objects, got something else at the top; wrap the rows "
            "in [...], or name the file .jsonl where each line is one object"
        )
    return [_object(value, f"{path} item {number}") for number, value in enumerate(top, 1)]


def _read_csv(path: Path) -> list[dict[str, Any]]:
    before = csv.field_size_limit(max(path.stat().st_size, 1))  # a cell may be a whole document
    reader = csv.reader((text for _, text in _lines(path)), strict=True)
    records, header = [], None
    try:
        for cells in reader:
            if not "".join(cells).strip() and len(cells) < 2:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                if len(set(header)) < len(header):
                    raise DataError(f"{path} must name each column once; rename one in line 1")
            elif len(cells) != len(header):
                raise DataError(
                    f"{path} line {reader.line_num} must have {len(header)} fields as the header "
                    f"has, got {len(cells)}; put double quotes around a field that holds a comma"
                )
            else:
                records.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"{path} line {reader.line_num} must be valid CSV, got: {error}; close the quotes, "
            "and double those inside a field"
        ) from None
    finally:
        csv.field_size_limit(before)
    return records


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"{path} needs the package pyarrow, got none; install it, or convert it to .jsonl"
        ) from error
    try:
        records: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{path} must be a Parquet file, got: {shown(str(error))}; fetch or write it again"
        ) from None
    return records


_READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
