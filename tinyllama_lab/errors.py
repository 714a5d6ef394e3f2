"""All errors that this project raises.

A message states the rule, what was received, and what to type instead.
"""

from __future__ import annotations

import errno
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

JOINERS = "\u200c\u200d"  # zero-width joiners: Devanagari and emoji need them


def shown(text: str, limit: int = 80) -> str:
    """Return the first `limit` characters of a text, with control characters escaped.

    The text may come from a file, so terminal escapes in it must not reach the terminal.
    """
    return "".join(
        c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode()
        for c in text[:limit]
    )


def one_line(text: str, limit: int = 200) -> str:
    """Return the beginning of another library's message in one line, for the middle of ours."""
    return shown(" ".join(text.split()), limit)


def printable(text: str) -> str:
    """Return all lines of a text, with control characters escaped: a terminal obeys none."""
    return "\n".join(shown(line, len(line)) for line in text.split("\n"))


def without_password(text: str) -> str:
    """Return the text with the passwords and tokens in every URL replaced by `***`."""
    text = re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:***@", text)
    return _SECRET.sub(r"\1***", text)


# of the query of an address: ...?token=abc
_SECRET = re.compile(
    r"([?&][\w.-]*(?:token|password|passwd|pwd|secret|key|signature)[\w.-]*=)[^&#\s'\"]+",
    re.IGNORECASE,
)


class LabError(Exception):
    """Base class of the errors that a user can fix; the command line prints no traceback."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class ConfigError(LabError):
    """One or several invalid settings; raised once, with all problems."""

    def __init__(self, problems: Sequence[str], hint: str = "") -> None:
        distinct = list(dict.fromkeys(problems))  # trials of a grid repeat the same problem
        head = "1 problem" if len(distinct) == 1 else f"{len(distinct)} problems"
        body = "\n".join(f"  - {problem}" for problem in distinct)
        body += f"\n{hint}" if hint else ""
        super().__init__(f"{head} in the configuration; nothing was started:\n{body}")
        self.problems = distinct


class DataError(LabError):
    """A data set cannot be read, or does not contain what the configuration requires."""


class DamagedError(DataError):
    """Some lines are damaged; `rows` has an empty row for each, or is empty if most are."""

    def __init__(self, rows: Sequence[dict[str, Any]], *problems: str) -> None:
        super().__init__(*problems)
        self.rows = list(rows)


class EncodingError(DataError):
    """Some lines of a text file are not UTF-8, but most are."""


class TooFewRowsError(DataError):
    """A data set has fewer usable rows than requested."""


class TooLongError(DataError):
    """A sequence is longer than the positions of the model, which `data.max_length` can mend."""

    def __init__(self, problem: str, max_length: int, consequence: str) -> None:
        self._problem, self._consequence = problem, consequence
        self.max_length = max_length
        super().__init__(self._text({}))

    def with_settings(self, settings: Mapping[str, int]) -> DataError:
        """Return the same error, whose advice holds further settings."""
        return DataError(self._text(settings))

    def _text(self, settings: Mapping[str, int]) -> str:
        values = {"data.max_length": self.max_length, **settings}
        advice = " ".join(f"{name}={value}" for name, value in values.items())
        return f"{self._problem}; set {advice}{self._consequence}"


class DataChangedError(DataError):
    """The data changed after the sweep was planned; running the command again makes a new plan."""


class DataDownloadError(DataError):
    """A data set of the hub cannot be downloaded; running the command again may succeed."""


class ModelError(LabError):
    """A base model, or one of its modules, cannot be found."""


class StudyError(LabError):
    """A study folder cannot be used: its name is invalid, or another driver uses it."""


class CacheError(LabError):
    """The user's cache cannot be written to, but something must be stored there."""


class BaseError(LabError):
    """The base model cannot be loaded or evaluated, so no trial on it can run."""


class BaseMemoryError(BaseError):
    """The base model does not fit into memory; its trials end as `oom`."""


class DivergedError(LabError):
    """The loss, or a weight, became NaN or infinite during training."""


class StoppedError(LabError):
    """The worker was asked to stop; its progress is saved."""


# errors of a path that the user can fix: missing permission, or a file in place of a folder
_IN_THE_WAY = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
    errno.ESTALE,
    errno.EINVAL,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, or the limit of a file
_NO_HANDLES = (errno.EMFILE, errno.ENFILE)


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed because the disk, a quota or a file is full.

    safetensors raises an error without `errno`, so its message is compared.
    """
    texts = (f"os error {number}" for number in _FULL)
    return getattr(error, "errno", None) in _FULL or any(text in str(error) for text in texts)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, as a subclass.

    CPython notes a plain KeyboardInterrupt that leaves an executed string, such as one of
    `dataclass`, and then ends by SIGINT, whatever exit status the program chose.
    """


@contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Turn Ctrl-C into one line and the exit status of an interrupted command.

    Raises:
        SystemExit: with 130, after the line was printed.
    """
    is_main = threading.current_thread() is threading.main_thread()
    replaces = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if replaces:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; what is done is kept, and the same command continues", file=sys.stderr)
        raise SystemExit(130) from None  # 128 + SIGINT, as shells report it
    finally:
        if replaces:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn this project's errors and Ctrl-C into a message and an exit status.

    Raises:
        SystemExit: with the exit status, after the message was printed.
        OSError: the error has no cause that the user can fix by a setting.
    """
    try:
        with quiet_interrupt():
            yield
    except LabError as error:
        # a name in it may come from a file, with escapes that a terminal obeys
        print(f"error: {without_password(printable(str(error)))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if is_disk_full(error):
            text = f"the disk is full ({error}); free some space and run the same command again"
        elif error.errno in _NO_HANDLES:
            text = (
                f"too many files are open at the same time ({error}); raise the limit with "
                "ulimit -n 1024 and run the same command again"
            )
        elif error.errno in _IN_THE_WAY and error.filename:
            text = (
                f"{error.filename} cannot be used ({error.strerror}); correct that, or choose "
                "another study=<name> or sweeps_dir=<folder>"
            )
        else:
            raise
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
