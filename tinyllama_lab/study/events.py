"""The append-only event file of a trial or pack: one checksummed JSON record per line.

The worker appends and the driver follows. A line that a crash cut off is never read, and is
removed before the next append.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

from tinyllama_lab.study.files import no_link, open_file
from tinyllama_lab.study.trial import canonical_json

Event = dict[str, Any]


def checksum(record: Event) -> int:
    """Return the CRC-32 of a record's canonical JSON."""
    return zlib.crc32(canonical_json(record).encode())


class EventLog:
    """Appends events to a file. Each record is one write, so readers never see half a line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        drop_cut_line(path)  # else the next record would continue the cut line, and be lost too

    def append(self, kind: str, **fields: Any) -> None:
        """Append one event; `time` (seconds since 1970) and `crc` are added here."""
        record: Event = {"kind": kind, "time": time.time(), **fields}
        record["crc"] = checksum(record)
        with open(self._path, "ab", opener=no_link) as file:
            # JSON escapes line ends, so a record is always one line
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


class EventReader:
    """Reads an event file from a byte `offset` on; each `poll` returns the events added since."""

    def __init__(self, path: Path, offset: int = 0, containing: bytes = b"") -> None:
        self._path, self._containing = path, containing
        self.offset = offset
        self.damaged = 0  # complete lines that are not JSON or fail their checksum

    def poll(self) -> list[Event]:
        """Return the new events, without a last line that is still being written."""
        try:
            with open_file(self._path) as file:
                file.seek(0, os.SEEK_END)
                if file.tell() < self.offset:  # the file was replaced by a shorter one
                    self.offset = 0
                file.seek(self.offset)
                block = file.read()
        except OSError:  # there is none yet, or a folder; a result says what is wrong with it
            return []
        whole = block[: block.rfind(b"\n") + 1]  # empty if no line has ended yet
        self.offset += len(whole)
        lines = [line for line in whole.splitlines() if self._containing in line]
        return [event for line in lines if (event := self._parse(line)) is not None]

    def _parse(self, line: bytes) -> Event | None:
        try:
            record: Event = json.loads(line)
            if record.pop("crc") == checksum(record):
                return record
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        self.damaged += 1  # skipped, not raised: one bad line must not cost the other events
        return None


def read_events(path: Path, containing: bytes = b"") -> list[Event]:
    """Return all valid events of a file, oldest first; an empty list if there is no file.

    Args:
        path: the file.
        containing: only lines with these bytes are parsed, which is much faster.
    """
    return EventReader(path, containing=containing).poll()


def read_notes(path: Path) -> list[str]:
    """Return what a worker has told the user about a trial, oldest first."""
    notes = read_events(path, containing=b'"note"')
    return [str(event.get("text")) for event in notes if event["kind"] == "note"]


def drop_cut_line(path: Path) -> None:
    """Remove the incomplete last line that a crash left in a file of lines."""
    if not path.exists():
        return
    with open(path, "rb+", opener=no_link) as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)
