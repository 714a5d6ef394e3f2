"""Reads rows from JSON: lines, arrays, and objects around them.

Every shape that pandas and `datasets` write is read, whatever the suffix. Numbers stay as they are
written, since they become text for the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tinyllama_lab.data.formats.cells import DECODER, SPLIT_KEY, parse_json, split_word
from tinyllama_lab.data.formats.columns import PAIRED
from tinyllama_lab.data.formats.turns import is_chat, is_pairs
from tinyllama_lab.data.reading.decoding import DataFile, read_text
from tinyllama_lab.errors import DamagedError, DataError, shown

Record = dict[str, Any]

_ROWS_KEYS = ("data", "rows", "examples", "instances", "items", "records", "conversations")
_MAX_LISTED_LINES = 5  # in a message
_NON_SPACE = re.compile(r"\S")


def read_json(file: DataFile) -> list[Record]:
    """Return the rows of a JSON file: an array, one object per line, or an object of columns.

    Raises:
        DataError: the file is not JSON, or not rows; the message names the line if there is one.
        DamagedError: single lines are damaged.
    """
    text = read_text(file)
    lines = (line for line in text.split("\n") if line.strip())
    first = next(lines, None)
    if first is None:
        return []
    # `Dataset.to_json` writes JSON lines into files that end in .json
    if next(lines, None) and isinstance(_value_or_none(first), dict):
        return _lines(text, file)
    try:
        values = _documents(text, file)
    except DataError:
        if file.suffix != ".json" and not text.lstrip().startswith("["):
            return _lines(text, file)  # its error names the line
        raise
    if len(values) > 1:
        return [_checked_object(v, f"{file} item {n}") for n, v in enumerate(values, 1)]
    return _rows_of(values[0], file)


def _value_or_none(text: str) -> Any:
    try:
        return parse_json(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def _lines(text: str, file: DataFile) -> list[Record]:
    """Return one row per line. Only a line feed ends a line: U+2028 and CR belong to the text.

    Raises:
        DamagedError: some lines are damaged. It holds one problem for each kind of damage, and
            the rows that can be read.
    """
    records: list[Record] = []
    errors: dict[str, list[tuple[int, DataError]]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record: Record = {}  # stands for a damaged line, so that later rows keep their numbers
        try:
            value = parse_json(line.strip())
            record = _checked_object(value, f"{file} line {number}")
        except (json.JSONDecodeError, RecursionError) as error:
            bad = number, _bad_json(error, line, file, number)
            errors.setdefault(type(error).__name__, []).append(bad)
        except DataError as error:
            errors.setdefault(type(value).__name__, []).append((number, error))
        records.append(record)
    if errors:
        is_mostly_read = len(records) > 2 * sum(map(len, errors.values()))
        raise DamagedError(
            records if is_mostly_read else [], *map(_combined_message, errors.values())
        )
    return records


def _combined_message(errors: list[tuple[int, DataError]]) -> str:
    """Return the first of several errors of one kind, and the lines of all."""
    if len(errors) == 1:
        return str(errors[0][1])
    first = ", ".join(str(number) for number, _ in errors[:_MAX_LISTED_LINES])
    more = " and more" if len(errors) > _MAX_LISTED_LINES else ""
    return f"{errors[0][1]}; {len(errors)} lines have this problem: {first}{more}"


def _documents(text: str, file: DataFile) -> list[Any]:
    """Return every JSON value of a text that holds one, or several one after another."""
    values, position = [], _skip_space(text, 0)
    while position < len(text):
        try:
            value, position = DECODER.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _bad_json(error, text, file) from None
        values.append(value)
        position = _skip_space(text, position)
    return values


def _skip_space(text: str, position: int) -> int:
    """Return the position of the next character that is not white space."""
    match = _NON_SPACE.search(text, position)
    return match.start() if match else len(text)


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


def _checked_object(value: Any, location: str) -> Record:
    """Return the value if it is an object.

    Raises:
        DataError: it is anything else; `location` says where in the file it is.
    """
    if not isinstance(value, dict):
        kind = {list: "an array", bool: "true or false", type(None): "null"}.get(type(value))
        raise DataError(
            f"{location} must be an object of columns, got {kind or 'a string or number'}; write "
            '{"prompt": "...", "response": "..."}'
        )
    return value


def _rows_of(top: Any, file: DataFile) -> list[Record]:
    """Return the rows of a whole JSON document.

    The shapes are tried in turn: the first that matches says where the rows are.

    Raises:
        DataError: no shape matches.
    """
    if isinstance(top, list):
        return [_checked_object(value, f"{file} item {n}") for n, value in enumerate(top, 1)]
    if isinstance(top, dict):
        for shape in (_wrapped, _split_oriented, _single_chat, _column_lists, _indexed):
            rows = shape(top)
            if rows is not None:
                return rows
    if isinstance(top, dict) and file.suffix != ".json":
        return [top]  # JSON lines with a single line
    keys = ", ".join(shown(str(key), 40) for key in list(top)[:10]) if top else ""
    content = f"an object with the keys {keys}" if isinstance(top, dict) else "something else"
    if file.suffix != ".json":
        _checked_object(top, f"{file} line 1")
    raise DataError(
        f"{file} must hold an array of objects, got {content}; wrap the rows in [...], or rename "
        "the file to .jsonl if each line is one object"
    )


def _wrapped(top: Mapping[str, Any]) -> list[Record] | None:
    """Return the rows of `{"data": [...]}`, or of `{"train": [...], "test": [...]}`.

    In the second form, each row has the split of its list under `SPLIT_KEY`.
    """
    lists = {key: value for key, value in top.items() if _is_rows(value)}
    words = {key: split_word(key) or "" for key in lists}
    if len(lists) > 1 and all(words.values()):
        return [{**row, SPLIT_KEY: words[key]} for key, rows in lists.items() for row in rows]
    # exports of messengers have a list of participants as well
    if len(lists) > 1 and "messages" in lists:
        return list(lists["messages"])
    if len(lists) == 1:
        ((key, rows),) = lists.items()
        others = [value for name, value in top.items() if name != key]
        is_named = key.casefold() in _ROWS_KEYS or words[key]
        # next to another list, only a list with a usual name holds the rows
        if is_named or not any(isinstance(value, list) for value in others):
            return list(rows)
    return None


def _is_rows(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(row, dict) for row in value) and not is_chat(value)


def _split_oriented(top: Mapping[str, Any]) -> list[Record] | None:
    """Return the rows of a data frame that pandas wrote with `orient="split"`."""
    columns, data = top.get("columns"), top.get("data")
    if not isinstance(columns, list) or not isinstance(data, list):
        return None
    if not all(isinstance(row, list) and len(row) == len(columns) for row in data):
        return None
    return [dict(zip(map(str, columns), row, strict=True)) for row in data]


def _single_chat(top: Mapping[str, Any]) -> list[Record] | None:
    """Return an object that is itself one conversation as the only row."""
    inner = (v for value in top.values() if isinstance(value, dict) for v in value.values())
    is_one = any(is_chat(v) for v in (*top.values(), *inner) if isinstance(v, list))
    is_one |= any(is_pairs(v) for name, v in top.items() if name.casefold() in PAIRED)
    return [dict(top)] if is_one else None


def _column_lists(top: Mapping[str, Any]) -> list[Record] | None:
    """Return the rows of an object of columns: `{"prompt": ["...", ...], "response": [...]}`."""
    columns = list(top.values())
    if not columns or not all(isinstance(column, list) for column in columns):
        return None
    if any(map(_is_rows, columns)) or len({len(column) for column in columns}) > 1:
        return None
    return [dict(zip(top, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _indexed(top: Mapping[str, Any]) -> list[Record] | None:
    """Return the rows of a data frame that pandas wrote with `orient="columns"` or `"index"`.

    The first, which is the default of pandas, maps columns to cells by row number; the second maps
    row numbers to rows.
    """
    values = list(top.values())
    if not values or not all(isinstance(value, dict) for value in values):
        return None
    if all(key.isdecimal() for key in top):  # orient="index"
        return [dict(row) for row in values]
    keys = list(values[0])
    if not all(list(value) == keys for value in values) or not all(k.isdecimal() for k in keys):
        return None
    return [{name: column[key] for name, column in top.items()} for key in keys]
