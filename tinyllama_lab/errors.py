"""Everything this project raises on purpose. A message: the rule, what was received, a remedy."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

JOINERS = "\u200c\u200d"  # Devanagari and emoji are not written without them


def shown(text: str, limit: int = 80) -> str:
    """The head of a foreign text, fit for a terminal: control characters are escaped."""
    return "".join(
        c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode()
        for c in text[:limit]
    )


class LabError(Exception):
    """Base of all errors that a user can act on; the command line shows it without a traceback."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class ConfigError(LabError):
    """One or several settings break their rule; raised once, with all of them."""

    def __init__(self, problems: Sequence[str], hint: str = "") -> None:
        known = list(dict.fromkeys(problems))
        head = "1 problem" if len(known) == 1 else f"{len(known)} problems"
        body = "\n".join(f"  - {problem}" for problem in known)
        body += f"\n{hint}" if hint else ""
        super().__init__(f"{head} in the configuration; nothing was started:\n{body}")
        self.problems = known


class DataError(LabError):
    """A data set cannot be read, or does not hold what the configuration asks of it."""


class DamagedError(DataError):
    """Some lines are damaged; `rows` has an empty one for each, and none where most are."""

    def __init__(self, rows: Sequence[dict[str, Any]], *problems: str) -> None:
        super().__init__(*problems)
        self.rows = list(rows)


class EncodingError(DataError):
    """Some lines of a text are not UTF-8, and most are."""


class TooFewRowsError(DataError):
    """A data set can be read and divided, and has fewer usable rows than are asked for."""


class DataChangedError(DataError):
    """The data is not what the sweep was planned with; the same command plans it anew."""


class ModelError(LabError):
    """A base model or one of its modules cannot be found."""


class StudyError(LabError):
    """A study folder cannot be used: a name that is not allowed, or another driver holds it."""


class CacheError(LabError):
    """The user's cache cannot be written to, and something must be kept there."""


class BaseError(LabError):
    """The base model cannot be loaded or scored, so no trial on it can be run."""


class BaseMemoryError(BaseError):
    """The base model does not fit into memory; its trials end as `oom`."""


class DivergedError(LabError):
    """The loss, or a weight, stopped being a finite number while a trial trained."""


class StoppedError(LabError):
    """The worker was asked to stop; what it had done is saved."""


# of a file where a folder should be, or the other way round, and of what belongs to others
_IN_THE_WAY = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; safetensors says it in words only."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn this project's own errors and Ctrl-C into a message and an exit status."""
    try:
        yield
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if is_disk_full(error):
            text = f"the disk is full ({error}); free some and run the same command again"
        elif error.errno in _IN_THE_WAY and error.filename:
            text = (
                f"{error.filename} cannot be used ({error.strerror}); correct that, or set "
                "another study=<name> or sweeps_dir=<folder>"
            )
        else:
            raise
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; what is done is kept, and the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
