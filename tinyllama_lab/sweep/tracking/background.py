"""Runs a tracker in a thread of its own, so that no request to a server delays a sweep.

The loop that follows the workers also starts them and gives them trials. While it waits for a
server, a free slot stays empty and a search asks for no trial.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from tinyllama_lab.study.trial import Result, TrialFolder
from tinyllama_lab.sweep.tracking.mirror import Tracker

PATIENCE_S = 5.0  # for a server, after the user has stopped the command
_NOTE_AFTER_S = 20.0  # of waiting for a server at the end

_Job = Callable[[Tracker], None]
_logger = logging.getLogger(__name__)


class Background(Tracker):
    """A tracker whose methods return at once; `close` waits for what is under way.

    Args:
        begin: returns the tracker; it is called in the thread, and gets an event. From the
            moment that the event is set, the tracker must send no more requests.
    """

    def __init__(self, begin: Callable[[threading.Event], Tracker]) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._to_sync: set[str] = set()  # keys of trials with a waiting `sync`
        self._given_up = threading.Event()
        # a daemon: a request that hangs must not keep the process alive
        self._thread = threading.Thread(
            target=self._run, args=(begin,), name="tracking", daemon=True
        )
        self._thread.start()

    def follow(self, trial: TrialFolder, label: str, params: Mapping[str, Any]) -> None:
        self._jobs.put(lambda tracker: tracker.follow(trial, label, params))

    def sync(self, trial: TrialFolder) -> None:
        if trial.key in self._to_sync:  # one is enough, however long the server takes
            return
        self._to_sync.add(trial.key)

        def job(tracker: Tracker) -> None:
            self._to_sync.discard(trial.key)
            tracker.sync(trial)

        self._jobs.put(job)

    def finish(self, trial: TrialFolder, result: Result) -> None:
        self._jobs.put(lambda tracker: tracker.finish(trial, result))

    def close(self, summary: Mapping[str, float], stopped: bool) -> None:
        """End the run of the study after all that waits; a stopped command waits seconds only."""
        self._jobs.put(lambda tracker: tracker.close(summary, stopped))
        self._jobs.put(None)
        try:
            self._thread.join(PATIENCE_S if stopped else _NOTE_AFTER_S)
            if self._thread.is_alive() and not stopped:
                _logger.warning(
                    "results are still being sent to MLflow; Ctrl-C leaves the rest to the same "
                    "command"
                )
                self._thread.join()
        finally:
            self._given_up.set()

    def _run(self, begin: Callable[[threading.Event], Tracker]) -> None:
        try:
            tracker = begin(self._given_up)
            while (job := self._jobs.get()) is not None and not self._given_up.is_set():
                job(tracker)
        except Exception:  # results are on disk: a bug here must not cost the sweep
            _logger.exception("tracking has ended; the sweep continues without it")
