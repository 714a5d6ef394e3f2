"""How commands are written: a value for Hydra's parser, then a word for the shell."""

from __future__ import annotations

import re
import shlex

_INTERPOLATION = re.compile(r"(\\*)\$\{")
_QUOTE_OR_END = re.compile(r'(\\*)("|\Z)')


def quoted(text: str) -> str:
    """A string that Hydra reads as exactly this text, whatever stands in it."""
    text = _INTERPOLATION.sub(lambda found: 2 * found[1] + r"\${", text)
    text = _QUOTE_OR_END.sub(lambda found: 2 * found[1] + (r"\"" if found[2] else ""), text)
    return f'"{text}"'


def setting(key: str, text: str) -> str:
    """`key=text`, with quotes for Hydra where the text is more than letters, digits and `./_-`."""
    is_plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", text) and text.lower() not in _WORDS
    return f"{key}={text if is_plain else quoted(text)}"


_WORDS = ("null", "true", "false", "nan", "inf")  # Hydra reads them as values


def typed(key: str, text: str) -> str:
    """What one types in a shell so that a setting is exactly this text."""
    return shlex.quote(setting(key, text))
