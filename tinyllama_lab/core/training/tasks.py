"""Turns the tasks of a pack into attempts; those that cannot begin fail here."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.training.attempt import Attempt, classify, count_attempt
from tinyllama_lab.core.training.prepare import prepare
from tinyllama_lab.errors import LabError
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.pack import Task
from tinyllama_lab.study.trial import Result

logger = logging.getLogger(__name__)


def make_attempts(context: WorkerContext, tasks: Sequence[Task]) -> list[Attempt]:
    """Return the trials that can be attempted; one with a damaged configuration fails here."""
    attempts = []
    for task in tasks:
        try:
            attempts.append(Attempt(context, task))
        except LabError as error:
            _refuse(task, error)
    return attempts


def tasks_with_data(data: DataCache, tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks whose data can be read; the others fail before a model is loaded."""
    readable = []
    for task in tasks:
        try:
            science: Science = part(Science, task.read_config())
            prepare(data, science.data, science.eval, science.seed)
        except LabError as error:
            _refuse(task, error)
            continue
        except Exception:
            logger.debug("%s: deferred until the trial starts", task.trial.name, exc_info=True)
        readable.append(task)
    return readable


def _refuse(task: Task, error: LabError) -> None:
    """Write the result of a trial that cannot begin."""
    trial, (state, record) = task.trial, classify(error)
    log = EventLog(trial.events_file)
    attempts = count_attempt(log, trial)
    overrides, result_folder = list(task.overrides), task.result_folder
    result_folder.commit(Result(result_folder.key, trial.name, state, record, overrides, attempts))
    log.append("state", state=str(state))
    logger.error("%s failed", trial.folder.name, exc_info=error)
