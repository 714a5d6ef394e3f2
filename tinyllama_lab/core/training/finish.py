"""Scores trained adapters together with the base, and commits their results.

This is the boundary between training and evaluation: no trial becomes done without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from tinyllama_lab.core.context import WorkerContext, raise_if_fatal
from tinyllama_lab.core.engines.base import Adapter, Engine
from tinyllama_lab.core.evaluation.bases import Bases
from tinyllama_lab.core.evaluation.load import Scored, ScoringLoad, scoring_load
from tinyllama_lab.core.evaluation.losses import general_examples
from tinyllama_lab.core.evaluation.run import Subject, score
from tinyllama_lab.core.training.attempt import Attempt
from tinyllama_lab.core.training.memory import Planner
from tinyllama_lab.errors import StoppedError
from tinyllama_lab.metrics import MIB

logger = logging.getLogger(__name__)


def finish(
    context: WorkerContext,
    engine: Engine[Any],
    bases: Bases,
    adapters: Mapping[Attempt, Adapter],
    planner: Planner,
    beside_mib: float,
) -> None:
    """Score and commit every attempt and remove its adapter; a failure affects one attempt.

    The results hold the predicted peak of scoring, with `beside_mib` of adapters that still train,
    as far as `planner` knows what a token takes.

    Raises:
        StoppedError: the worker was asked to stop.
    """
    begin = time.monotonic()
    with bases.missing([(a.base, a.science) for a in adapters]) as unscored_bases:
        subjects = [attempt.subject(adapter) for attempt, adapter in adapters.items()]
        predicted = _predicted(context, engine, planner, [*unscored_bases, *subjects], beside_mib)
        for subject in subjects:
            subject.result.metrics |= predicted
        _score(context, engine, [*unscored_bases, *subjects])
        # before the trials, whose results hold the scores of their base
        bases.commit(unscored_bases)
    seconds, together = time.monotonic() - begin, len(unscored_bases) + len(subjects)
    for (attempt, adapter), subject in zip(adapters.items(), subjects, strict=True):
        attempt.record_scoring(seconds, together)
        try:
            if subject.error is not None:
                raise subject.error
            attempt.commit(bases.result_of(attempt.base))
        except StoppedError:
            raise
        except Exception as error:
            raise_if_fatal(error)
            attempt.fail(error)
        engine.remove(adapter)
    # the peak of scoring must not count as that of later training
    context.memory.reset()


def _predicted(
    context: WorkerContext,
    engine: Engine[Any],
    planner: Planner,
    subjects: list[Subject],
    beside_mib: float,
) -> dict[str, float]:
    """Return the predicted peak of scoring, as a metric in MiB; empty if nothing was trained."""
    if not planner.is_ready:
        return {}
    try:
        load = _load(context, engine, subjects)
    except Exception as error:  # a forecast must not cost the trained adapters
        raise_if_fatal(error)
        logger.warning("no forecast of the memory of scoring", exc_info=error)
        return {}
    sizes = [
        subject.adapter.trainable_params * engine.parameter_bytes / MIB
        for subject in subjects
        if subject.adapter is not None
    ]
    return {"memory/predicted_infer_mib": planner.scoring_mib(sizes, load) + beside_mib}


def _load(context: WorkerContext, engine: Engine[Any], subjects: list[Subject]) -> ScoringLoad:
    needs_general = any(subject.settings.general for subject in subjects)
    general = general_examples(context.data) if needs_general else []
    scored = [
        Scored(s.adapter, s.prepared.heldout, general if s.settings.general else [], s.settings)
        for s in subjects
    ]
    return scoring_load(context.base, engine, scored, 2 * context.micro_batch_tokens)


def _score(context: WorkerContext, engine: Engine[Any], subjects: list[Subject]) -> None:
    """Score together, or one by one if that fails; errors are stored in the subjects."""
    try:
        score(context, engine, subjects)
    except StoppedError:
        raise
    except Exception as error:
        raise_if_fatal(error)
        if len(subjects) == 1:
            subjects[0].error = error
            return
        for subject in subjects:
            _score(context, engine, [subject])
