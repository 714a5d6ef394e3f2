"""When a trial folder is mirrored, and what happens while the place it goes to is down.

The folder is the record, the mirror a view of it. So whatever the server does, a sweep goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from tinyllama_lab.study.events import EventReader
from tinyllama_lab.study.study import Study
from tinyllama_lab.study.trial import Result, Trial
from tinyllama_lab.sweep.tracking.record import (
    Entry,
    Point,
    Tracked,
    final_points,
    points_of,
    result_digest,
    spell,
    without_password,
)

_SAVE_EVERY_S = 3.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 60.0

_logger = logging.getLogger(__name__)


class Tracker:
    """Shows a study elsewhere while it runs. No method raises because that place is down."""

    def follow(self, trial: Trial, label: str, params: Mapping[str, Any]) -> None:
        """A trial starts, or starts again; its run is called `label`."""

    def sync(self, trial: Trial) -> None:
        """Pass on the metrics that are new; costs microseconds when none are."""

    def finish(self, trial: Trial, result: Result) -> None:
        """A trial has ended: pass on its result and its files."""

    def close(self, summary: Mapping[str, float], stopped: bool) -> None:
        """The study has ended, or was `stopped`; `summary` is shown on its own run."""


class NullTracker(Tracker):
    """The tracker of `tracking.enabled=false`: does nothing."""


@dataclass
class FollowedTrial:
    """A trial that has not been mirrored to its end."""

    trial: Trial
    label: str
    params: dict[str, str]
    is_open: bool = False  # its run is known to be RUNNING
    result: Result | None = None


class Store(Protocol):
    """The place that a mirror writes to. Every method may be called again after it failed."""

    def connect(self, tracked: Tracked, followed: Collection[str]) -> None:
        """Find or make the study's own run; end the runs that no driver follows any more."""

    def open_run(self, tracked: Tracked, followed: FollowedTrial) -> Entry:
        """Find or make the run of a trial and show it as RUNNING."""

    def log_points(self, run_id: str, points: Iterable[Point]) -> None:
        """Add metrics; one that is there already is not added again."""

    def log_files(self, run_id: str, trial: Trial, result: Result) -> None:
        """Add the files of a trial and name its data."""

    def end_run(self, run_id: str, result: Result, end_ms: int | None) -> None:
        """Show how a trial ended."""

    def end_study(self, tracked: Tracked, summary: Mapping[str, float], stopped: bool) -> None:
        """Show how the study ended."""


class Mirror(Tracker):
    """The tracker that follows trial folders and writes to a store."""

    def __init__(self, study: Study, uri: str, store: Store) -> None:
        self._study, self._uri, self._store = study, uri, store
        self._tracked = Tracked.read(study.tracked_file, uri)
        self._followed: dict[str, FollowedTrial] = {}
        self._is_connected = self._is_down = self._has_warned = False
        self._pause_s = self._retry_at = self._saved_at = 0.0
        self._attempt(lambda: None)

    def follow(self, trial: Trial, label: str, params: Mapping[str, Any]) -> None:
        texts = {name: spell(value) for name, value in params.items()}
        followed = self._followed[trial.key] = FollowedTrial(trial, label, texts)
        self._attempt(partial(self._open, followed))

    def sync(self, trial: Trial) -> None:
        followed = self._followed.get(trial.key)
        if followed is not None and self._has_news(trial):
            self._attempt(partial(self._sync, followed))

    def finish(self, trial: Trial, result: Result) -> None:
        followed = self._followed.setdefault(trial.key, FollowedTrial(trial, trial.name, {}))
        followed.result = result
        self._attempt(partial(self._finish, followed, result))

    def close(self, summary: Mapping[str, float], stopped: bool) -> None:
        """End the study's run, after one more try for the results that could not be sent."""
        if stopped and self._is_down:
            return  # someone waits for us to end: do not wait for a server that is down
        self._is_down = False
        for followed in list(self._followed.values()):
            if followed.result is not None and not self._is_down:
                self._retry_at = 0.0
                self._attempt(partial(self._finish, followed, followed.result))
        if not self._is_down:
            self._retry_at = 0.0
        self._attempt(partial(self._close, summary, stopped))

    def _attempt(self, action: Callable[[], object]) -> None:
        if time.monotonic() < self._retry_at:
            return
        try:
            if not self._is_connected:
                self._store.connect(self._tracked, self._followed.keys())
                self._tracked.closed = False
                self._save()
                self._is_connected = True
            action()
        except Exception as error:  # each store has its own: SQLAlchemy's, requests', OSError
            self._note_failure(error)
        except BaseException:  # a Ctrl-C may have cut off a request that was carried out
            self._is_connected = False
            raise
        else:
            self._pause_s, self._is_down = 0.0, False

    def _note_failure(self, error: Exception) -> None:
        # A request may have been carried out without its answer: look everything up again.
        self._is_connected = False
        self._is_down = getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE"
        self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
        self._retry_at = time.monotonic() + self._pause_s
        level = logging.DEBUG if self._has_warned else logging.WARNING
        self._has_warned = True
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _logger.log(
            level,
            f"tracking needs {without_password(self._uri)} to take what is sent, got "
            f"{without_password(what)[:400]}; the sweep goes on without it, run the same command "
            "again to send what is missing",
        )

    def _has_news(self, trial: Trial) -> bool:
        entry = self._tracked.trials.get(trial.key)
        try:
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
        entry.offset = reader.offset  # only now: what failed is read and sent again
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self._save()

    def _finish(self, followed: FollowedTrial, result: Result) -> None:
        trial, entry = followed.trial, self._open(followed)
        checksum = result_digest(result)
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
        self._tracked.write(self._study.tracked_file)
        self._saved_at = time.monotonic()
