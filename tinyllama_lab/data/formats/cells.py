"""Values of single cells: missing values, text, lists and objects, and names of splits.

File formats store the same value differently. JSON has numbers; Parquet has floats for integers
with gaps; pandas has several values for "missing"; CSV has lists as strings.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

# key of a record for the split that its file's name says; no column can have this name
SPLIT_KEY = "\0split"
# TEST rows are held out too, and used only to confirm a recommendation
TRAIN, HELDOUT, TEST = "train", "heldout", "test"
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_NEGATED = re.compile(r"(?<![^\W_])(?:not?|non|exclude[ds]?|without|skip|ignore[d]?)(?![^\W_])")
_TEST_WORDS = r"tests?|testing|testset"
_VALIDATION_WORDS = (
    r"evals?|evaluation|evaluate|evalset|val|valid|validate|validation|valset"
    r"|dev|devel|development|devset|held[-_ ]?out|hold[-_ ]?out"
)
# words of file names and split columns; all that `datasets` knows are among them
_SPLIT_WORDS = {
    TRAIN: r"train|training|trainset",
    HELDOUT: f"{_TEST_WORDS}|{_VALIDATION_WORDS}",
}
SPLIT_COLUMNS = (  # names of columns that may say which rows are held out
    *("split", "splits", "split_name", "data_split", "dataset_split"),
    *("set", "subset", "partition", "fold", "phase", "usage"),
)
# `is_valid` is left out, since it usually says that a row passed some check
_BOOLEAN_SPLIT_NAME = re.compile(
    rf"(?:is|in|for)[-_ ]?(?!valid$)(?:{'|'.join(_SPLIT_WORDS.values())})|train|test|held_?out"
)
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_NUMBER_OR_BOOL = re.compile(
    r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|true|false|yes|no", re.IGNORECASE
)
_DATA_URL = re.compile(r"\s*data:(?:image|audio|video)/")
MEDIA = frozenset("image images img picture photo audio audios speech video videos".split())
# a list of objects as NumPy prints it, with only white space between two objects
_NUMPY_LIST = re.compile(r"\[\s*\{(?=[\s\S]*\}\s+\{)")
# of `unicodedata.category`: controls, formats, marks, and separators
_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Mn", "Me", "Zl", "Zp", "Zs"})
# letters and Braille patterns without a visible shape, in categories of visible characters
_BLANK_CHARACTERS = "\u115f\u1160\u2800\u3164\uffa0"
_SPLIT_PATTERNS = {
    side: re.compile(rf"(?<![^\W\d_])(?:{words})(?![^\W\d_])")
    for side, words in _SPLIT_WORDS.items()
}
_VALIDATION = re.compile(rf"(?<![^\W\d_])(?:{_VALIDATION_WORDS})(?![^\W\d_])")


class UnusableRow(Exception):
    """A row that cannot be trained on.

    Args:
        reason: a short identifier, such as `empty_prompt`, by which such rows are counted.
        detail: what is wrong with this row, for the user.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(detail)


class Number(str):
    """A number of a JSON file, as the string that the file holds."""

    __slots__ = ()


def parse_json(text: str) -> Any:
    """Parse JSON, keeping numbers as they are written. A bare NaN or Infinity becomes None.

    Raises:
        json.JSONDecodeError: the text is not JSON.
        RecursionError: it is nested too deeply.
    """
    return DECODER.decode(text)


# numbers stay strings: as Python numbers, some would be rounded, infinite or too long to convert
DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=lambda _: None)


def to_python(value: Any) -> Any:
    """Convert a NumPy scalar or array to a Python value; return any other value unchanged."""
    if hasattr(value, "tolist") and type(value).__name__ not in ("datetime64", "timedelta64"):
        return value.tolist()
    return value


def is_missing(value: Any) -> bool:
    """Return whether a cell holds no value: None, NaN, an infinite number, pandas' NA or NaT."""
    value = to_python(value)
    if isinstance(value, Decimal):
        return not value.is_finite()
    if isinstance(value, float):
        return not math.isfinite(value)
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return type(value).__name__ in ("datetime64", "timedelta64") and str(value) == "NaT"


def is_blank(text: str) -> bool:
    """Return whether a string has no visible character.

    White space, control characters and combining marks without a letter are invisible.
    """
    if text[:1].isascii() and text[:1].isalnum():  # fast path for most texts
        return False
    return all(
        unicodedata.category(c) in _INVISIBLE_CATEGORIES or c in _BLANK_CHARACTERS for c in text
    )


def as_text(value: Any) -> str:
    """Return a cell as text; an empty string for a missing value.

    Raises:
        UnusableRow: `not_text`, for a list, an object or bytes.
    """
    if isinstance(value, str):
        return str(value)
    value = to_python(value)
    if is_missing(value):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple | set | Mapping | bytes | bytearray):
        raise UnusableRow("not_text", f"a cell must be text, got a {type(value).__name__}")
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def as_json(value: Any) -> str:
    """Return a value as JSON that keeps the order of keys and the spelling of numbers."""
    value = value if isinstance(value, str) else to_python(value)
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, Mapping):
        pairs = (f"{as_json(str(key))}: {as_json(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_json, value)) + "]"
    if is_missing(value):
        return "null"
    if isinstance(value, bool | int | float | str):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(as_text(value), ensure_ascii=False)


def parsed_cell(value: Any) -> Any:
    """Parse a string that holds a JSON, Python or NumPy list or object.

    Returns:
        The list or object; any other value unchanged.
    """
    value = value if isinstance(value, str) else to_python(value)
    if not isinstance(value, str) or not value.strip().startswith(("[", "{")):
        return value
    # in CSV, pandas writes lists as Python prints them, and `datasets` as NumPy prints them
    arrays = (_parse_array,) if _NUMPY_LIST.match(value.strip()) else ()
    for parse in (parse_json, ast.literal_eval, *arrays):
        try:
            return parse(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
    return value


def _parse_array(text: str) -> Any:
    """Parse a list of objects as NumPy prints it: without commas between the objects.

    Raises:
        ValueError, SyntaxError, tokenize.TokenError: it is not such a list.
    """
    tokens: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokens and tokens[-1][1] == "}" and token.string == "{":
            tokens.append((tokenize.OP, ","))
        if token.type not in (tokenize.NL, tokenize.NEWLINE):
            tokens.append((token.type, token.string))
    return ast.literal_eval(tokenize.untokenize(tokens).strip())


def cell_at(record: Mapping[str, Any], name: str) -> Any:
    """Return the cell of a column.

    Args:
        name: a column, or a path such as `chat.messages`: the key `messages` of the object in the
            column `chat`. A column whose own name has a dot comes first.

    Returns:
        The cell; None if there is none.
    """
    if name in record:
        return record[name]
    outer, *keys = name.split(".")
    cell = record.get(outer)
    for key in keys:
        cell = parsed_cell(cell)
        cell = cell.get(key) if isinstance(cell, Mapping) else None
    return cell


def readable_floats(numbers: Iterable[Any], bits: int) -> list[Any]:
    """Convert a column of floats to the numbers that people would write.

    A column of whole numbers with gaps becomes integers, since pandas stores integers with gaps as
    floats. Numbers of half or single precision get the digits of that precision: 0.1 instead of
    0.10000000149011612.

    Args:
        bits: the precision of the column: 16, 32 or 64.
    """
    cells = [None if is_missing(number) else float(number) for number in numbers]
    present = [number for number in cells if number is not None]
    if len(present) < len(cells) and all(number.is_integer() for number in present):
        return [None if number is None else int(number) for number in cells]
    if bits == 64:
        return list(cells)
    # imported late: only Arrow and Parquet have such columns, and pyarrow brings NumPy along
    import numpy as np

    short = {16: np.float16, 32: np.float32}[bits]
    return [None if number is None else float(str(short(number))) for number in cells]


def drop_nulls(value: Any) -> Any:
    """Return a nested value without the keys that are null.

    In Arrow all objects of a column share their keys, so each object has the keys of all others.
    """
    if isinstance(value, Mapping):
        return {k: drop_nulls(item) for k, item in value.items() if not is_missing(item)}
    if isinstance(value, list | tuple):
        return [drop_nulls(item) for item in value]
    return value


def decode_bytes(value: Any) -> Any:
    """Decode bytes that are UTF-8; return any other value unchanged."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value


def with_underscores(name: str) -> str:
    """Return a name with `_` between its words: `answerKey` becomes `answer_Key`."""
    return _CAMEL.sub("_", name)


def split_word(text: str) -> str | None:
    """Return the split that a name says: `train`, `heldout`, or None if it says none or both.

    A word counts if no letter touches it, as in `train-00000-of-00001` and `my_valid_2`. A negated
    name such as `no_test` says nothing.
    """
    folded = with_underscores(text).casefold()
    if _NEGATED.search(folded):
        return None
    sides = [side for side, pattern in _SPLIT_PATTERNS.items() if pattern.search(folded)]
    return sides[0] if len(sides) == 1 else None


def is_test(text: str) -> bool:
    """Return whether a split's name says `test`, and not also `validation` or a similar word."""
    folded = with_underscores(text).casefold()
    return split_word(text) == HELDOUT and not _VALIDATION.search(folded)


def is_split_column(name: str, cells: Iterable[Any]) -> bool:
    """Return whether a column says which rows are held out.

    A column named `split` always does, so that a misspelled split in it is reported. Any other
    column does if most of its cells are names of splits.
    """
    values = Counter(str(cell) for cell in cells)
    known = sum(count for value, count in values.items() if split_word(value))
    return bool(values) and (name.strip().casefold() == "split" or 2 * known > values.total())


def is_flag_name(name: str) -> bool:
    """Return whether a column may say by true and false which rows are held out: `is_test`."""
    return bool(_BOOLEAN_SPLIT_NAME.fullmatch(with_underscores(name.strip()).casefold()))


def has_true_and_false(cells: Iterable[Any]) -> bool:
    """Return whether every cell is true or false, and both occur."""
    words = (str(to_python(cell)).strip().casefold() for cell in cells)
    return {_BOOLEANS.get(word) for word in words} == {True, False}


def is_number_or_bool(cell: Any) -> bool:
    """Return whether a cell is a number, true or false, also as a string."""
    return bool(_NUMBER_OR_BOOL.fullmatch(str(to_python(cell)).strip()))


def is_list_or_object(cell: Any) -> bool:
    """Return whether a cell is a list or an object, also as a string."""
    return isinstance(parsed_cell(cell), list | tuple | Mapping)


def holds_media(cell: Any) -> bool:
    """Return whether a cell holds an image, audio or video, as `datasets` stores them."""
    cell = parsed_cell(cell)
    if isinstance(cell, list | tuple):
        return any(map(holds_media, cell))
    if isinstance(cell, Mapping):
        return bool({"bytes", "path", "array"} & cell.keys())
    return isinstance(cell, bytes) or bool(_DATA_URL.match(str(cell)))
