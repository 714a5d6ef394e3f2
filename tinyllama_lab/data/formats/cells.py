"""What one cell of a record holds: nothing, a text, or something with parts.

Every container spells these in its own way: JSON has numbers, Parquet has floats for integers
with gaps, pandas has several values for "missing", and CSV has lists as text.
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

SPLIT_KEY = "\0split"  # in a record: the split that the name of its file says, no column's name


TRAIN, HELDOUT, TEST = "train", "heldout", "test"  # test: held out, and for confirmation alone
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_NEGATED = re.compile(r"(?<![^\W_])(?:not?|non|exclude[ds]?|without|skip|ignore[d]?)(?![^\W_])")
_TEST_WORDS = r"tests?|testing|testset"
_VALIDATION_WORDS = (
    r"evals?|evaluation|evaluate|evalset|val|valid|validate|validation|valset"
    r"|dev|devel|development|devset|held[-_ ]?out|hold[-_ ]?out"
)
_SPLIT_WORDS = {  # the words of file names and split columns, those of `datasets` among them
    TRAIN: r"train|training|trainset",
    HELDOUT: f"{_TEST_WORDS}|{_VALIDATION_WORDS}",
}
SPLIT_COLUMNS = (  # names of columns that may say which rows are held out
    *("split", "splits", "split_name", "data_split", "dataset_split"),
    *("set", "subset", "partition", "fold", "phase", "usage"),
)
# `valid` is left out: such a column says as well that a row is sound
_BOOLEAN_SPLIT_NAME = re.compile(
    rf"(?:is|in|for)[-_ ]?(?!valid$)(?:{'|'.join(_SPLIT_WORDS.values())})|train|test|held_?out"
)
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_NUMBER_OR_BOOL = re.compile(
    r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|true|false|yes|no", re.IGNORECASE
)
_DATA_URL = re.compile(r"\s*data:(?:image|audio|video)/")
MEDIA = frozenset("image images img picture photo audio audios speech video videos".split())
# a list of objects as NumPy writes it: white space alone between two of them
_NUMPY_LIST = re.compile(r"\[\s*\{(?=[\s\S]*\}\s+\{)")
_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Mn", "Me", "Zl", "Zp", "Zs"})
_BLANK_CHARACTERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and patterns of no shape
_SPLIT_PATTERNS = {
    side: re.compile(rf"(?<![^\W\d_])(?:{words})(?![^\W\d_])")
    for side, words in _SPLIT_WORDS.items()
}
_VALIDATION = re.compile(rf"(?<![^\W\d_])(?:{_VALIDATION_WORDS})(?![^\W\d_])")


class UnusableRow(Exception):
    """A row that cannot be trained on. `reason` is counted, the message is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(detail)


class Number(str):
    """A number of a JSON file, as it is written there."""

    __slots__ = ()


def parse_json(text: str) -> Any:
    """JSON whose numbers stay as written; a bare NaN or Infinity is a missing value.

    Raises:
        json.JSONDecodeError, RecursionError: it is not JSON, or nested too deeply.
    """
    return DECODER.decode(text)


# as written, no number is too long to convert, rounded, or becomes infinite
DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=lambda _: None)


def to_python(value: Any) -> Any:
    """The Python value of a NumPy scalar or array; anything else as it is."""
    if hasattr(value, "tolist") and type(value).__name__ not in ("datetime64", "timedelta64"):
        return value.tolist()
    return value


def is_missing(value: Any) -> bool:
    """Whether a cell holds no value: None, NaN, an infinite number, pandas' NA or NaT."""
    value = to_python(value)
    if isinstance(value, Decimal):
        return not value.is_finite()
    if isinstance(value, float):
        return not math.isfinite(value)
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return type(value).__name__ in ("datetime64", "timedelta64") and str(value) == "NaT"


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: white space, controls, marks without a letter."""
    if text[:1].isascii() and text[:1].isalnum():  # most texts
        return False
    return all(
        unicodedata.category(c) in _INVISIBLE_CATEGORIES or c in _BLANK_CHARACTERS for c in text
    )


def as_text(value: Any) -> str:
    """The text of a cell; empty where it is missing.

    Raises:
        UnusableRow: it holds a list, an object or bytes.
    """
    if isinstance(value, str):
        return str(value)
    value = to_python(value)
    if is_missing(value):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple | set | Mapping | bytes | bytearray):
        raise UnusableRow("not_text", f"a {type(value).__name__} stands where text is needed")
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def as_json(value: Any) -> str:
    """JSON in the order of the data, with numbers as they are written there."""
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
    """A cell whose text is a JSON or Python list or object as that; any other as it is."""
    value = value if isinstance(value, str) else to_python(value)
    if not isinstance(value, str) or not value.strip().startswith(("[", "{")):
        return value
    # pandas writes lists into CSV as Python does, and `datasets` as NumPy does
    arrays = (_parse_array,) if _NUMPY_LIST.match(value.strip()) else ()
    for parse in (parse_json, ast.literal_eval, *arrays):
        try:
            return parse(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
    return value


def _parse_array(text: str) -> Any:
    """A list of objects as NumPy writes it: without commas between the objects."""
    tokens: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokens and tokens[-1][1] == "}" and token.string == "{":
            tokens.append((tokenize.OP, ","))
        if token.type not in (tokenize.NL, tokenize.NEWLINE):
            tokens.append((token.type, token.string))
    return ast.literal_eval(tokenize.untokenize(tokens).strip())


def cell_at(record: Mapping[str, Any], name: str) -> Any:
    """The cell of a column; for `chat.messages` the value of `messages` in the object `chat`."""
    if name in record:
        return record[name]
    outer, *keys = name.split(".")
    cell = record.get(outer)
    for key in keys:
        cell = parsed_cell(cell)
        cell = cell.get(key) if isinstance(cell, Mapping) else None
    return cell


def readable_floats(numbers: Iterable[Any], bits: int) -> list[Any]:
    """A column of floats as people write them.

    In a column with gaps, whole numbers are integers: that is how pandas stores integers with
    gaps. Numbers of half or single precision have the digits of that precision.
    """
    cells = [None if is_missing(number) else float(number) for number in numbers]
    present = [number for number in cells if number is not None]
    if len(present) < len(cells) and all(number.is_integer() for number in present):
        return [None if number is None else int(number) for number in cells]
    if bits == 64:
        return list(cells)
    import numpy as np  # late: only Parquet has such columns, and it came with pyarrow

    short = {16: np.float16, 32: np.float32}[bits]
    return [None if number is None else float(str(short(number))) for number in cells]


def drop_nulls(value: Any) -> Any:
    """A nested value of Arrow without the keys that are null: there, all objects share keys."""
    if isinstance(value, Mapping):
        return {k: drop_nulls(item) for k, item in value.items() if not is_missing(item)}
    if isinstance(value, list | tuple):
        return [drop_nulls(item) for item in value]
    return value


def decode_bytes(value: Any) -> Any:
    """A text that is stored as bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value


def split_word(text: str) -> str | None:
    """What a split's name or a file's says: `train`, `heldout`, or None where it does not say.

    A word counts where no letter touches it, as in `train-00000-of-00001` and `my_valid_2`.
    """
    folded = _CAMEL.sub("_", text).casefold()
    if _NEGATED.search(folded):
        return None
    sides = [side for side, pattern in _SPLIT_PATTERNS.items() if pattern.search(folded)]
    return sides[0] if len(sides) == 1 else None


def is_test(text: str) -> bool:
    """Whether a split's name says `test`, and neither `validation` nor another such word."""
    folded = _CAMEL.sub("_", text).casefold()
    return split_word(text) == HELDOUT and not _VALIDATION.search(folded)


def is_split_column(name: str, cells: Iterable[Any]) -> bool:
    """Whether a column says which rows are held out.

    One that is called `split` does, whatever stands in it: what is no split's name is refused.
    Another does where most of its cells are names of splits: one that is not is a mistake.
    """
    values = Counter(str(cell) for cell in cells)
    known = sum(count for value, count in values.items() if split_word(value))
    return bool(values) and (name.strip().casefold() == "split" or 2 * known > values.total())


def is_flag_name(name: str) -> bool:
    """Whether a column of this name may say by true and false what is held out: `is_test`."""
    return bool(_BOOLEAN_SPLIT_NAME.fullmatch(_CAMEL.sub("_", name.strip()).casefold()))


def has_true_and_false(cells: Iterable[Any]) -> bool:
    """Whether all cells are true or false, and there are cells of both kinds."""
    words = (str(to_python(cell)).strip().casefold() for cell in cells)
    return {_BOOLEANS.get(word) for word in words} == {True, False}


def is_number_or_bool(cell: Any) -> bool:
    """Whether a cell is a number, or true or false: no text, file or anything with parts."""
    return bool(_NUMBER_OR_BOOL.fullmatch(str(to_python(cell)).strip()))


def is_list_or_object(cell: Any) -> bool:
    """Whether a cell is a list or an object, or the text of one."""
    return isinstance(parsed_cell(cell), list | tuple | Mapping)


def holds_media(cell: Any) -> bool:
    """Whether a cell holds an image, audio or video itself, as `datasets` stores them."""
    cell = parsed_cell(cell)
    if isinstance(cell, list | tuple):
        return any(map(holds_media, cell))
    if isinstance(cell, Mapping):
        return bool({"bytes", "path", "array"} & cell.keys())
    return isinstance(cell, bytes) or bool(_DATA_URL.match(str(cell)))
