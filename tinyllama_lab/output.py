"""Standard output and error that take any text, in any encoding, and outlive who reads them."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class _Sink(io.FileIO):
    """Loses what is written once nobody reads any more, as after `| head`: the work goes on."""

    _has_failed = False

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes
        except OSError:
            if self._has_failed:  # a full disk, which was said already
                return memoryview(data).nbytes
            self._has_failed = True
            raise


def accept_any_text(encoding: str | None = None) -> None:
    """Replace what the encoding of the output has no characters for; called first of all.

    Args:
        encoding: of the output from here on; None keeps the one that the environment chose.
    """
    sys.stdout = _lenient(sys.stdout, "replace", encoding)
    sys.stderr = _lenient(sys.stderr, "backslashreplace", encoding)


def _lenient(stream: TextIO | None, errors: str, encoding: str | None) -> TextIO:
    if stream is None:  # it was closed before we began
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # somebody's own, such as a notebook's
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Sink(stream.fileno(), "wb", closefd=False)),
        encoding=encoding or stream.encoding,
        errors=errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
