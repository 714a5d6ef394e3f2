"""The base's own evaluation: done once for all trials and studies that are compared with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from tinyllama_lab.config import Science
from tinyllama_lab.core.bench import Bench
from tinyllama_lab.core.score import score
from tinyllama_lab.errors import BaseError, StoppedError, is_disk_full
from tinyllama_lab.events import EventLog
from tinyllama_lab.trial import Result, State, Trial

logger = logging.getLogger(__name__)


class Bases:
    """Looks evaluations of the base up, or makes them; a failure is kept as well."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._known: dict[Path, Result | BaseError] = {}

    def result_of(self, trial: Trial, science: Science) -> Result:
        """The evaluation in the folder `trial`; `science` is that of a trial compared with it.

        Raises:
            BaseError: the base cannot be scored.
            StoppedError: the worker was told to stop.
        """
        if trial.folder not in self._known:
            self._known[trial.folder] = self._find_or_make(trial, science)
        found = self._known[trial.folder]
        if isinstance(found, BaseError):
            raise found
        return found

    def _find_or_make(self, trial: Trial, science: Science) -> Result | BaseError:
        try:
            with self._held(trial):
                result, _ = trial.read_result()
                dtype = self._bench.environment()["dtype"]
                if result is None or result.environment.get("dtype") != dtype:
                    result = run_base(self._bench, trial, science)
                return result
        except StoppedError:
            raise
        except Exception as error:
            if is_disk_full(error):
                raise
            logger.exception("the base could not be scored")
            return BaseError(f"the base could not be scored: {error}")

    @contextmanager
    def _held(self, trial: Trial) -> Iterator[None]:
        """The only process that makes this evaluation; another study may be at it."""
        trial.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(trial.folder / "base.lock")
        while not lock.is_locked:
            self._bench.check_stop()
            with suppress(Timeout):
                lock.acquire(timeout=1)
        try:
            yield
        finally:
            lock.release()


def run_base(bench: Bench, trial: Trial, science: Science) -> Result:
    """Score the base without any adapter, and commit the result."""
    result = Result(trial.key, trial.name, State.DONE, environment=bench.environment())
    log = EventLog(trial.events_file)
    log.append("state", state="running", attempt=1)
    # the held-out rows are those of every trial, however many rows that trains on
    prepared = bench.data.prepare(replace(science.data, n=1, balance_by=None))
    result.data = {k: v for k, v in prepared.facts.items() if k.startswith("eval_")}
    result.model = {
        "name": science.model.name,
        "revision": science.model.identity,
        "parameters": bench.base.parameters,
        "trainable_params": 0,
    }
    score(bench, trial, science.eval, prepared, result)
    result.list_files(trial, trial.eval_dir.glob("*.jsonl"))
    trial.commit(result)
    log.append("state", state="done")
    return result
