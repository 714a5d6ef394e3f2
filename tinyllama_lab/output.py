"""Text from files for terminals and Markdown, and output that survives any text or closed pipe."""

from __future__ import annotations

import io
import os
import re
import sys
from typing import Any, TextIO

from tinyllama_lab.errors import shown

_WIDTH = 110  # characters per line if the output is not a terminal, which has no width of its own


# Markdown for code and links, and for emphasis where a letter touches the mark
_MARKS = re.compile(r"[`\[]|\*(?=\S)|(?<=\S)\*|(?<!\w)_|_(?!\w)")


def markdown(text: str) -> str:
    """Escape the markup of Markdown and HTML in a text."""
    # `&` and the backslash come before the characters whose escapes contain them
    for character, escape in (("&", "&amp;"), ("<", "&lt;"), ("\\", "\\\\"), ("|", "\\|")):
        text = text.replace(character, escape)
    return _MARKS.sub(r"\\\g<0>", text)


def code(text: str) -> str:
    """Return a text as code within a line of Markdown."""
    return f"`{shown(text.replace('`', chr(0x2BC)), 300)}`"


def line_width() -> int | None:
    """Return the characters of a line for Rich; None lets it ask the terminal."""
    return None if sys.stdout.isatty() else _WIDTH


class _Sink(io.FileIO):
    """A file that ignores a reader that went away, as after `| head`: the sweep goes on."""

    _has_failed = False

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes
        except OSError:
            if self._has_failed:  # a full disk, for example: raised once, then ignored
                return memoryview(data).nbytes
            self._has_failed = True
            raise


def accept_any_text(encoding: str | None = None) -> None:
    """Replace characters that the encoding of the output does not have.

    It must be called before anything is printed.

    Args:
        encoding: of the output from here on; None keeps the one that the environment chose.
    """
    sys.stdout = _lenient(sys.stdout, "replace", encoding)
    sys.stderr = _lenient(sys.stderr, "backslashreplace", encoding)


def _lenient(stream: TextIO | None, errors: str, encoding: str | None) -> TextIO:
    """Return a stream like `stream` that handles unknown characters as `errors` says."""
    if stream is None:  # it was closed before the program started
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # replaced already, for example by a notebook
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Sink(stream.fileno(), "wb", closefd=False)),
        encoding=encoding or stream.encoding,
        errors=errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
