"""Makes text from data and models safe for a page, a chart, a script or a spreadsheet."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from textwrap import wrap
from typing import Any

from markupsafe import Markup

from tinyllama_lab.errors import JOINERS

LONGEST = 20_000  # characters of any text in a report
LONGEST_CELL = 2000  # characters of a cell in a spreadsheet
# first characters that spreadsheets read as a formula (OWASP, "CSV Injection")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# characters that could end a script element, and the two line ends of old JavaScript strings
_SCRIPT = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}
_SPACE = re.compile(r"\s+")


def clean(text: str, limit: int = LONGEST) -> str:
    """Cut a text at `limit` and spell out control characters, terminal escapes among them."""
    if len(text) > limit:
        text = text[:limit] + f"… ({len(text) - limit} more characters)"
    if text.isprintable():  # the common case, without a look at each character
        return text
    text = text.replace("\r\n", "\n")
    return "".join(c if _is_harmless(c) else _spelled(c) for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in "\n\t\xa0" or character in JOINERS


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def one_line(text: str, limit: int = 200) -> str:
    """Return `clean(text)` without line breaks."""
    return _SPACE.sub(" ", clean(text, limit)).strip()


def label(text: str, limit: int = 60) -> str:
    """Return a text for a chart: Plotly's markup and HTML are shown, not interpreted."""
    return html.escape(cut(text, limit), quote=False)


def hover_label(text: str) -> str:
    """Return a text for a chart like `label`, but whole, on several lines."""
    return "<br>".join(label(line) for line in wrap(one_line(text), 60))


def cut(text: str, limit: int) -> str:
    """Return one line with its middle removed if it is long: a short form ends with a hash."""
    text = one_line(text)
    return text if len(text) <= limit else f"{text[: limit - 9]}…{text[-8:]}"


def printed(value: Any) -> Any:
    """Clean a string before a template escapes it; our own markup passes unchanged."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def script_json(value: Any) -> Markup:
    """Encode JSON that cannot end the `<script>` it stands in; NaN and infinity become null."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in _SCRIPT.items():
        text = text.replace(character, escape)
    return Markup(text)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def csv_cell(value: Any) -> str:
    """Return a cell that no spreadsheet interprets as a formula."""
    if value is None:
        return ""
    if isinstance(value, int | float):
        return str(value)
    raw = str(value)
    text = one_line(raw, LONGEST_CELL)
    # tested before and after cleaning: both leading tabs and what follows them are dangerous
    is_formula = raw.startswith(_FORMULA) or text.startswith(_FORMULA)
    return "'" + text if is_formula and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def leading(texts: Sequence[str], room: int) -> list[str]:
    """Return the first texts that together have at most `room` characters; at least one."""
    ends = accumulate(map(len, texts))
    return list(texts[: max(1, sum(end <= room for end in ends))])


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: `1 trial`, `2 trials`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
