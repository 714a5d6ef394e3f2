"""The containers of rows: JSON in its shapes, delimited text, Parquet.

Standard library only; pyarrow is imported where a Parquet file is met.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tinyllama_lab.cells import (
    DECODER,
    SPLIT_KEY,
    decoded,
    parse_json,
    spelled_floats,
    split_word,
    without_gaps,
)
from tinyllama_lab.decoding import DataFile, read_bytes, read_text
from tinyllama_lab.errors import DataError, shown
from tinyllama_lab.turns import is_chat

Record = dict[str, Any]

_ROWS_KEYS = ("data", "rows", "examples", "instances", "items", "records", "conversations")
_DELIMITERS = ",;\t"
_SNIFFED_ROWS = 50
_NO_SPACE = re.compile(r"\S")
_INDEX = re.compile(r"__index_level_\d+__")  # how pandas stores its index in Parquet


def read_json(file: DataFile) -> list[Record]:
    """Rows of a JSON file, whether it is an array, one object a line, or an object of columns.

    Raises:
        DataError: with the line, where there is one.
    """
    text = read_text(file)
    lines = (line for line in text.split("\n") if line.strip())
    first = next(lines, None)
    if first is None:
        return []
    if next(lines, None) and isinstance(_value_or_none(first), dict):
        return _lines(text, file)
    try:
        values = _documents(text, file)
    except DataError:
        if file.suffix != ".json" and not text.lstrip().startswith("["):
            return _lines(text, file)  # which names the line
        raise
    if len(values) > 1:
        return [_object(v, f"{file} item {n}") for n, v in enumerate(values, 1)]
    return _rows_of(values[0], file)


def _value_or_none(text: str) -> Any:
    try:
        return parse_json(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def _lines(text: str, file: DataFile) -> list[Record]:
    """One object a line. Only LF ends a line: U+2028 and CR are part of the text."""
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = parse_json(line.strip())
            except (json.JSONDecodeError, RecursionError) as error:
                raise _bad_json(error, line, file, number) from None
            records.append(_object(value, f"{file} line {number}"))
    return records


def _documents(text: str, file: DataFile) -> list[Any]:
    """Every JSON value of a text: one, or several that follow each other."""
    values, at = [], _after_space(text, 0)
    while at < len(text):
        try:
            value, at = DECODER.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _bad_json(error, text, file) from None
        values.append(value)
        at = _after_space(text, at)
    return values


def _after_space(text: str, at: int) -> int:
    found = _NO_SPACE.search(text, at)
    return found.start() if found else len(text)


def _bad_json(error: Exception, text: str, file: DataFile, line: int = 1) -> DataError:
    if not isinstance(error, json.JSONDecodeError):
        return DataError(
            f"{file} line {line} must be a flat object, got one that is nested too deeply; "
            "remove or flatten it"
        )
    excerpt = text.split("\n")[error.lineno - 1].strip()
    return DataError(
        f"{file} line {line + error.lineno - 1} must be valid JSON, got '{shown(excerpt)}' "
        f"({error.msg}, column {error.colno}); correct or remove the line"
    )


def _object(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        kind = {list: "an array", bool: "true or false", type(None): "null"}.get(type(value))
        raise DataError(
            f"{place} must be an object of columns, got {kind or 'a text or number'}; write "
            '{"prompt": "...", "response": "..."}'
        )
    return value


def _rows_of(top: Any, file: DataFile) -> list[Record]:
    """The rows of a whole JSON document, of the shapes that say plainly where they are."""
    if isinstance(top, list):
        return [_object(value, f"{file} item {n}") for n, value in enumerate(top, 1)]
    if isinstance(top, dict):
        for shape in (_wrapped, _split_oriented, _single_chat, _lists, _indexed):
            rows = shape(top)
            if rows is not None:
                return rows
    if isinstance(top, dict) and file.suffix != ".json":
        return [top]  # a file of one line
    keys = ", ".join(shown(str(key), 40) for key in list(top)[:10]) if top else ""
    what = f"an object with the keys {keys}" if isinstance(top, dict) else "something else"
    if file.suffix != ".json":
        _object(top, f"{file} line 1")
    raise DataError(
        f"{file} must hold an array of objects, got {what}; wrap the rows in [...], or name the "
        "file .jsonl where each line is one object"
    )


def _wrapped(top: Mapping[str, Any]) -> list[Record] | None:
    """`{"data": [...]}`, or a list of rows for each split: `{"train": [...], "test": [...]}`."""
    lists = {key: value for key, value in top.items() if _is_rows(value)}
    words = {key: split_word(key) or "" for key in lists}
    if len(lists) > 1 and all(words.values()):
        return [{**row, SPLIT_KEY: words[key]} for key, rows in lists.items() for row in rows]
    if len(lists) == 1:
        ((key, rows),) = lists.items()
        others = [value for name, value in top.items() if name != key]
        is_named = key.casefold() in _ROWS_KEYS or words[key]
        if is_named or not any(isinstance(value, list) for value in others):
            return list(rows)
    return None


def _is_rows(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(row, dict) for row in value) and not is_chat(value)


def _split_oriented(top: Mapping[str, Any]) -> list[Record] | None:
    """What pandas writes with `orient="split"`."""
    columns, data = top.get("columns"), top.get("data")
    if not isinstance(columns, list) or not isinstance(data, list):
        return None
    if not all(isinstance(row, list) and len(row) == len(columns) for row in data):
        return None
    return [dict(zip(map(str, columns), row, strict=True)) for row in data]


def _single_chat(top: Mapping[str, Any]) -> list[Record] | None:
    """One conversation is one row."""
    return [dict(top)] if any(is_chat(v) for v in top.values() if isinstance(v, list)) else None


def _lists(top: Mapping[str, Any]) -> list[Record] | None:
    """An object of columns: `{"prompt": ["...", "..."], "response": [...]}`."""
    columns = list(top.values())
    if not columns or not all(isinstance(column, list) for column in columns):
        return None
    if any(map(_is_rows, columns)) or len({len(column) for column in columns}) > 1:
        return None
    return [dict(zip(top, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _indexed(top: Mapping[str, Any]) -> list[Record] | None:
    """What pandas writes by default (columns of cells by index) or with `orient="index"`."""
    values = list(top.values())
    if not values or not all(isinstance(value, dict) for value in values):
        return None
    if all(key.isdecimal() for key in top):
        return [dict(row) for row in values]
    keys = list(values[0])
    if not all(list(value) == keys for value in values) or not all(k.isdecimal() for k in keys):
        return None
    return [{name: column[key] for name, column in top.items()} for key in keys]


# ---- delimited text ------------------------------------------------------------------------


def read_csv(file: DataFile) -> list[Record]:
    """Rows of delimited text. Commas, semicolons or tabs: whatever cuts the rows alike.

    Raises:
        DataError: damaged quotes, a name that two columns have, or rows of another length.
    """
    text = read_text(file)
    named = re.match(r"sep=(.)\r?\n", text)  # how Excel says it
    text = text[named.end() :] if named else text
    before = csv.field_size_limit(max(len(text), 1))  # a cell may be a whole document
    try:
        delimiter = named[1] if named else _delimiter(text, file)
        return _table(list(_csv_rows(text, delimiter, file)), delimiter, file)
    finally:
        csv.field_size_limit(before)


def _csv_rows(text: str, delimiter: str, file: DataFile) -> Iterator[tuple[int, list[str]]]:
    """Every row that is not blank, and the line on which it ends."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(
            f"{file} line {reader.line_num} must be valid CSV, got: {error}; close the quotes, "
            "and double those inside a field"
        ) from None


def _delimiter(text: str, file: DataFile) -> str:
    """The one that cuts most of the first rows into as many cells as the header."""
    delimiters = _DELIMITERS if file.suffix == ".csv" else "\t" + _DELIMITERS
    head = text[: 2**20]

    def fit(delimiter: str) -> tuple[float, int]:
        rows = []
        try:
            for _, cells in _csv_rows(head, delimiter, file):
                rows.append(len(cells))
                if len(rows) == _SNIFFED_ROWS:
                    break
        except DataError:
            pass  # the table is read with its own words for it
        width = rows[0] if rows else 1
        alike = sum(count == width for count in rows) / max(len(rows), 1)
        return (alike, width) if width > 1 else (0.0, 1)

    return max(delimiters, key=fit)


def _table(rows: list[tuple[int, list[str]]], delimiter: str, file: DataFile) -> list[Record]:
    if not rows:
        return []
    header = _header(rows[0][1], [cells for _, cells in rows[1:]], file)
    width = len(header)
    # spreadsheets write empty cells beyond the last column
    ragged = [(n, c) for n, c in rows[1:] if len(c) < width or "".join(c[width:]).strip()]
    if ragged:
        line, cells = ragged[0]
        more = f" (and {len(ragged) - 1} more such rows)" if len(ragged) > 1 else ""
        sign = {"\t": "a tab", ";": "a semicolon"}.get(delimiter, "a comma")
        raise DataError(
            f"{file} line {line} must have {width} fields as the header has, got "
            f"{len(cells)}{more}; put double quotes around a field that holds {sign}"
        )
    named = [(number, name) for number, name in enumerate(header) if name is not None]
    return [{name: cells[n] for n, name in named} for _, cells in rows[1:]]


def _header(names: list[str], rows: list[list[str]], file: DataFile) -> list[str | None]:
    """The names of the columns; None for one without a name and without content."""
    header: list[str | None] = []
    for number, name in enumerate(names):
        is_used = name.strip() or any("".join(row[number : number + 1]).strip() for row in rows)
        header.append((name.strip() or f"column_{number + 1}") if is_used else None)
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise DataError(
            f"{file} must name each column once, got two called {', '.join(map(shown, twice))}; "
            "rename one in line 1"
        )
    return header


# ---- Parquet -------------------------------------------------------------------------------


def read_parquet(file: DataFile) -> list[Record]:
    """Rows of a Parquet file.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"{file} needs the package pyarrow, got none; install it, or convert it to .jsonl"
        ) from error
    try:
        with io.BytesIO(read_bytes(file)) if file.packed else file.path.open("rb") as stream:
            table = pq.ParquetFile(stream).read()
            twice = [n for n, count in Counter(table.column_names).items() if count > 1]
            if twice:
                raise DataError(
                    f"{file} must name each column once, got two called "
                    f"{', '.join(map(shown, twice))}; rename one"
                )
            return arrow_records(table)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{file} must be a Parquet file, got: {shown(str(error))}; fetch or write it again"
        ) from None


def arrow_records(table: Any) -> list[Record]:
    """The rows of an Arrow table, with cells as `spelled_floats` and `without_gaps` say.

    Raises:
        DataError: a column holds what Python has no value for.
    """
    import pyarrow as pa

    names = [name for name in table.column_names if not _INDEX.fullmatch(name)]
    columns = []
    for name in names:
        column = table.column(name)
        try:
            cells = column.to_pylist()
        except OverflowError as error:
            raise DataError(
                f"column '{shown(name)}' must hold dates of the years 1 to 9999 and durations of "
                f"less than 10^9 days, got: {error}; correct it, or leave the column out"
            ) from None
        if pa.types.is_floating(column.type):
            cells = spelled_floats(cells, column.type.bit_width)
        columns.append([decoded(without_gaps(cell)) for cell in cells])
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


# ---- which split a name stands for ---------------------------------------------------------


READERS: dict[str, Callable[[DataFile], list[Record]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json,
}
