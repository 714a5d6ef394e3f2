"""Mirrors trial folders into a store, and retries while the store is down.

The trial folder is the record and the mirror only a view of it, so a failure of the store never
stops a sweep.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from tinyllama_lab.errors import without_password
from tinyllama_lab.study.events import EventReader
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, TrialFolder
from tinyllama_lab.sweep.tracking.record import (
    Entry,
    Point,
    Tracked,
    final_points,
    points_of,
    result_digest,
    spell,
)

_SAVE_EVERY_S = 3.0  # between two writes of `tracked.json`
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 60.0  # between retries; each pause is twice the last

_logger = logging.getLogger(__name__)


class Tracker:
    """Shows a study elsewhere while it runs. No method raises if that place is down."""

    def follow(self, trial: TrialFolder, label: str, params: Mapping[str, Any]) -> None:
        """Record that a trial has started; `label` names its run."""

    def sync(self, trial: TrialFolder) -> None:
        """Pass on the new metrics of a trial; without any, the call takes microseconds."""

    def finish(self, trial: TrialFolder, result: Result) -> None:
        """Pass on the result and the files of a trial that has ended."""

    def close(self, summary: Mapping[str, float], stopped: bool) -> None:
        """End the run of the study, with the metrics in `summary`."""


class NullTracker(Tracker):
    """The tracker of `tracking.enabled=false`, which does nothing."""


@dataclass
class FollowedTrial:
    """A trial that is not completely mirrored yet."""

    trial: TrialFolder
    label: str
    params: dict[str, str]
    is_open: bool = False  # whether its run is known to be RUNNING
    result: Result | None = None


class Store(Protocol):
    """The store that a mirror writes to. Every method may be repeated after a failure."""

    def connect(self, tracked: Tracked, followed: Collection[str]) -> None:
        """Find or create the run of the study, and end the runs that no driver follows."""

    def open_run(self, tracked: Tracked, followed: FollowedTrial) -> Entry:
        """Find or create the run of a trial, and set it to RUNNING."""

    def log_points(self, run_id: str, points: Iterable[Point]) -> None:
        """Add metrics; repeated ones are not added again."""

    def log_files(self, run_id: str, trial: TrialFolder, result: Result) -> None:
        """Add the files and data sets of a trial."""

    def end_run(self, run_id: str, result: Result, end_ms: int | None) -> None:
        """Set the final status of a trial's run."""

    def end_study(self, tracked: Tracked, summary: Mapping[str, float], stopped: bool) -> None:
        """Set the final status of the study's run, with its metrics and files."""


class Mirror(Tracker):
    """A tracker that follows trial folders and writes to a store."""

    def __init__(self, study: StudyFolder, uri: str, store: Store) -> None:
        self._study, self._uri, self._store = study, uri, store
        self._tracked = Tracked.read(study, uri)
        self._followed: dict[str, FollowedTrial] = {}
        self._is_connected = self._is_down = self._has_warned = False
        self._pause_s = self._retry_at = self._saved_at = 0.0
        # connect now, so that the database exists before any worker runs
        self._attempt(lambda: None)

    def follow(self, trial: TrialFolder, label: str, params: Mapping[str, Any]) -> None:
        texts = {name: spell(value) for name, value in params.items()}
        followed = self._followed[trial.key] = FollowedTrial(trial, label, texts)
        self._attempt(partial(self._open, followed))

    def sync(self, trial: TrialFolder) -> None:
        followed = self._followed.get(trial.key)
        if followed is not None and self._has_news(trial):
            self._attempt(partial(self._sync, followed))

    def finish(self, trial: TrialFolder, result: Result) -> None:
        followed = self._followed.setdefault(trial.key, FollowedTrial(trial, trial.name, {}))
        followed.result = result
        self._attempt(partial(self._finish, followed, result))

    def close(self, summary: Mapping[str, float], stopped: bool) -> None:
        """End the run of the study, after one more attempt to send the missing results."""
        if stopped and self._is_down:
            return  # the user waits for the command to end, so do not wait for the server
        self._is_down = False
        # one more attempt for each, whatever failed before
        for followed in list(self._followed.values()):
            if followed.result is not None and not self._is_down:
                self._retry_at = 0.0
                self._attempt(partial(self._finish, followed, followed.result))
        if not self._is_down:
            self._retry_at = 0.0
        self._attempt(partial(self._close, summary, stopped))

    def _attempt(self, action: Callable[[], object]) -> None:
        # during a pause, so that an outage does not slow the sweep
        if time.monotonic() < self._retry_at:
            return
        try:
            if not self._is_connected:
                self._store.connect(self._tracked, self._followed.keys())
                self._tracked.closed = False
                self._save()
                self._is_connected = True
            action()
        except Exception as error:  # SQLAlchemy, requests and the OS each raise their own
            self._note_failure(error)
        except BaseException:  # Ctrl-C: the store may have carried out the request
            self._is_connected = False
            raise
        else:
            self._pause_s, self._is_down = 0.0, False

    def _note_failure(self, error: Exception) -> None:
        # the store may have carried out the request, so look everything up again
        self._is_connected = False
        # MLflow refuses an invalid value with this code; then the server itself is up
        self._is_down = getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE"
        self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
        self._retry_at = time.monotonic() + self._pause_s
        # one warning is enough for an outage
        level = logging.DEBUG if self._has_warned else logging.WARNING
        self._has_warned = True
        # SQLAlchemy adds the statement and a link
        cause = re.split(r"\[SQL: |\(Background on", " ".join(str(error).split()))[0].strip()
        cause = f"{type(error).__name__}: {cause}"
        _logger.log(
            level,
            f"tracking could not write to {without_password(self._uri)}: "
            f"{without_password(cause)[:400]}; the sweep continues without it; run the same "
            "command again to send what is missing",
        )

    def _has_news(self, trial: TrialFolder) -> bool:
        entry = self._tracked.trials.get(trial.key)
        try:
            # a size is cheaper to read than the file, and events are only appended
            return trial.events_file.stat().st_size != (entry.offset if entry else 0)
        except OSError:
            return False

    def _open(self, followed: FollowedTrial) -> Entry:
        entry = self._tracked.trials.get(followed.trial.key)
        if entry is None or not followed.is_open:
            entry = self._store.open_run(self._tracked, followed)
            self._tracked.trials[followed.trial.key] = entry
            followed.is_open = True
            self._save()
        return entry

    def _sync(self, followed: FollowedTrial) -> None:
        entry = self._open(followed)
        reader = EventReader(followed.trial.events_file, entry.offset)
        events = reader.poll()
        self._store.log_points(entry.run_id, points_of(events, entry.step))
        for event in events:
            entry.time_ms = max(entry.time_ms, int(event["time"] * 1000))
            entry.step = max(entry.step, int(event.get("step") or 0))
        entry.offset = reader.offset  # only after success, so that a failed batch is sent again
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self._save()

    def _finish(self, followed: FollowedTrial, result: Result) -> None:
        trial, entry = followed.trial, self._open(followed)
        checksum = result_digest(trial, result)
        # otherwise an earlier command has sent all of it
        if entry.result != checksum:
            self._sync(followed)
            self._store.log_points(entry.run_id, final_points(trial, result, entry.time_ms))
            self._store.log_files(entry.run_id, trial, result)
        self._store.end_run(entry.run_id, result, entry.time_ms or None)
        entry.result = checksum
        self._save()
        del self._followed[trial.key]

    def _close(self, summary: Mapping[str, float], stopped: bool) -> None:
        self._store.end_study(self._tracked, summary, stopped)
        self._tracked.closed = not stopped
        self._save()

    def _save(self) -> None:
        self._tracked.write(self._study)
        self._saved_at = time.monotonic()
