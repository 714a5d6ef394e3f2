"""The evaluation of the base, made once for all trials and studies that compare with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from tinyllama_lab.config.schema import Science
from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.dataset.dataset import Prepared
from tinyllama_lab.core.evaluation.run import Subject
from tinyllama_lab.core.out_of_memory import base_error
from tinyllama_lab.errors import BaseError, StoppedError, is_disk_full
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.trial import Evaluation, Result, State, TrialFolder

logger = logging.getLogger(__name__)


class Bases:
    """Finds stored evaluations of bases and lists the missing ones; failures are stored too."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._results: dict[Path, Result | BaseError] = {}

    def result_of(self, trial: TrialFolder) -> Result:
        """Return the evaluation in the folder of `trial`.

        Raises:
            BaseError: the base cannot be scored.
        """
        result = self._results[trial.folder]
        if isinstance(result, BaseError):
            raise result
        return result

    def check(self, trial: TrialFolder) -> None:
        """Refuse to train a trial whose base cannot be scored.

        Raises:
            BaseError: an earlier try to score the base failed.
        """
        if isinstance(self._results.get(trial.folder), BaseError):
            self.result_of(trial)

    @contextmanager
    def missing(self, bases: Sequence[tuple[TrialFolder, Science]]) -> Iterator[list[Subject]]:
        """Yield the bases to score, locked so that no other process scores them too.

        Raises:
            StoppedError: the worker was asked to stop while another process held a lock.
        """
        unscored = {
            trial.folder: (trial, science)
            for trial, science in bases
            if trial.folder not in self._results
        }
        with ExitStack() as locks:
            subjects = []
            for folder in sorted(unscored):  # the same order in every process avoids deadlocks
                trial, science = unscored[folder]
                locks.enter_context(self._locked(trial))
                # under the lock: another process may have scored this base in the meantime
                if subject := self._begin(trial, science):
                    subjects.append(subject)
            yield subjects

    def commit(self, subjects: Sequence[Subject]) -> None:
        """Write the results of scored bases, and keep the errors of the others."""
        for subject in subjects:
            if subject.error is not None:
                self._fail(subject.trial, subject.error)
                continue
            subject.trial.commit(subject.result, subject.trial.eval_dir.glob("*.jsonl"))
            EventLog(subject.trial.events_file).append("state", state="done")
            self._results[subject.trial.folder] = subject.result

    def _begin(self, trial: TrialFolder, science: Science) -> Subject | None:
        """Return the base as a subject; None if it is scored already, or its data cannot be read.

        A stored evaluation must have this worker's precision and the held-out tokens of its
        trials, because a chat template or its date may have changed. An old one without bits
        per byte is made again.
        """
        stored, _ = trial.read_result()
        result = Result(trial.key, trial.name, State.DONE, environment=self._context.environment())
        try:
            # the held-out rows are those of every trial, however many rows that trains on
            data = replace(science.data, n=1, balance_by=None, subset="nested")
            prepared = self._context.data.prepare(data, scored=science.eval.rows)
        except Exception as error:
            EventLog(trial.events_file).append("state", state="running", attempt=1)
            self._fail(trial, error)
            return None
        if stored is not None and self._is_current(stored, prepared):
            self._results[trial.folder] = stored
            return None
        EventLog(trial.events_file).append("state", state="running", attempt=1)
        result.data = {k: v for k, v in prepared.facts.items() if k.startswith("eval_")}
        result.model = self._context.model_facts(science.model)
        evaluation = Evaluation(trial.eval_dir)
        return Subject(trial, evaluation, science.eval, prepared, result, None)

    def _is_current(self, stored: Result, prepared: Prepared) -> bool:
        fingerprints = ("eval_fingerprint", "eval_text_fingerprint")
        same_tokens = all(stored.data.get(name) == prepared.facts[name] for name in fingerprints)
        dtype = self._context.environment()["dtype"]
        return same_tokens and stored.environment.get("dtype") == dtype

    def _fail(self, trial: TrialFolder, error: Exception) -> None:
        if isinstance(error, StoppedError) or is_disk_full(error):
            raise error
        logger.error("the base could not be scored", exc_info=error)
        # in memory alone, so that the next command tries again
        self._results[trial.folder] = base_error(error, "scored")

    @contextmanager
    def _locked(self, trial: TrialFolder) -> Iterator[None]:
        """Lock an evaluation, because a worker of another study may be making it."""
        trial.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(trial.lock_file)
        while not lock.is_locked:
            self._context.check_stop()
            with suppress(Timeout):
                # not longer, because a stop must be noticed while another process scores
                lock.acquire(timeout=1)
        try:
            yield
        finally:
            lock.release()
