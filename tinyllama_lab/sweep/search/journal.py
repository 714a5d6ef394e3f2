"""The log of a search, which Optuna reads and appends to.

It has the format of Optuna's own file backend, so that its dashboard opens it, and beyond it a
number and a checksum in every line. Optuna would read a changed digit as another proposal, and go
on from it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.events import checksum, drop_cut_line
from tinyllama_lab.study.files import no_link, open_file
from tinyllama_lab.study.study import StudyFolder

LOG_LINES = "log_lines"  # in `search.json`
# Optuna's operations that only annotate studies and trials; its dashboard appends them for notes
_ANNOTATIONS = (2, 3, 8, 9)
_NUMBER, _CHECKSUM = "number", "crc"


def count_lines(study: StudyFolder) -> int:
    """Return how many lines the log of a search has; 0 if it is in another storage."""
    if not study.optuna_file.is_file():
        return 0
    return study.optuna_file.read_bytes().count(b"\n")


def _least_lines(study: StudyFolder) -> int:
    """Return how many lines the log had when a search last ended."""
    try:
        return int(study.read_record(study.search_file).get(LOG_LINES, 0))
    except (FileNotFoundError, StudyError):  # the report names a damaged file
        return 0


def _forget_lines(study: StudyFolder) -> None:
    """Forget how many lines a log had that was deleted; a new one begins."""
    try:
        record = study.read_record(study.search_file)
    except (FileNotFoundError, StudyError):
        return
    if record.pop(LOG_LINES, 0):
        study.write_record(study.search_file, record)


class Journal:
    """A journal backend of Optuna; the lock of the study leaves one driver as its writer."""

    def __init__(self, study: StudyFolder) -> None:
        """Open the log, and remove a line that a killed driver has cut off.

        Raises:
            StudyError: the log is damaged.
        """
        self._file = study.optuna_file
        study.optuna_lock_file.unlink(missing_ok=True)  # of Optuna's backend, in earlier versions
        study.folder.mkdir(parents=True, exist_ok=True)
        self._logs: list[dict[str, Any]] = []
        self._own = 0  # lines that this project has written
        self._is_numbered = False  # whether the last of them is
        if not os.path.lexists(self._file):  # of a new search, or deleted
            _forget_lines(study)
            return
        try:
            with open_file(self._file) as file:
                drop_cut_line(self._file)
                for line in file:
                    self._logs.append(self._parse(line))
        except OSError as error:
            raise self._damaged(str(error)) from error
        if len(self._logs) < (least := _least_lines(study)):
            raise self._damaged(f"{len(self._logs)} of at least {least} lines")

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """Return the operations from a number on."""
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append operations, and wait until they are on the disk."""
        with open(self._file, "ab", opener=no_link) as file:
            for number, log in enumerate(logs, start=self._own):
                numbered = {**log, _NUMBER: number}
                line = json.dumps({**numbered, _CHECKSUM: checksum(numbered)})
                file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._own += len(logs)
        self._logs += json.loads(json.dumps(logs))  # as they will be read

    def _parse(self, line: bytes) -> dict[str, Any]:
        """Return the operation in the next line.

        Raises:
            StudyError: it was changed, or stood elsewhere.
        """
        try:
            log: dict[str, Any] = json.loads(line)
            known = log.pop(_CHECKSUM, None)
            if known is None and _NUMBER not in log and log["op_code"] in _ANNOTATIONS:
                return log
            # lines of earlier versions have neither, and come first
            is_earlier = known is None and not self._is_numbered and _NUMBER not in log
            is_whole = known == checksum(log) and log.pop(_NUMBER) == self._own
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            is_earlier = is_whole = False
        if not (is_earlier or is_whole):
            raise self._damaged(f"a damaged line {len(self._logs) + 1}")
        self._own, self._is_numbered = self._own + 1, is_whole
        return log

    def _damaged(self, what: str) -> StudyError:
        return StudyError(
            f"{self._file} must be the log of this search, got {what}; delete it and run the "
            "search's command again, which takes the results of its trials"
        )
