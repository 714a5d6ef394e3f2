"""Out of memory: how it is recognized, and what is tried before a trial ends as `oom`.

    loading the base       nothing is left to make smaller: its trials end as `oom`
    adding an adapter      it waits until adapters beside it have left
    a training step        micro-batches of half the tokens, then recomputed activations, then
                           half the adapters; one that is left alone ends as `oom`
    losses, generations    half as much in a forward pass, down to one example
    timing a batch         no measurement: another batch size would be another one

The steps of training are taken by `training.memory.Planner`, which knows what was planned, the
others here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tinyllama_lab.errors import BaseError, BaseMemoryError
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.trial import Trial

T = TypeVar("T")
_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python could not get memory, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def base_error(error: Exception, done: str) -> BaseError:
    """What trials hear of a base that could not be `done` (loaded, scored)."""
    if is_out_of_memory(error):
        return BaseMemoryError(
            f"the base must fit into memory to be {done}, got: {error}; set quant=nf4 or take a "
            "smaller model"
        )
    return BaseError(f"the base could not be {done}: {error}")


def fit(attempt: Callable[[int], T], size: int, least: int, trial: Trial) -> tuple[T, int]:
    """Run `attempt(size)`, with half the size as often as memory runs out.

    Args:
        attempt: takes how much to do at a time.
        size: what to begin with.
        least: below it nothing would get smaller; the error is raised then.
        trial: gets a note of every retry.

    Returns:
        What `attempt` returned, and the size that it was given.
    """
    while True:
        try:
            return attempt(size), size
        except BaseException as error:
            if not is_out_of_memory(error) or size <= least:
                raise
        size //= 2
        text = f"out of memory; trying again with {size} at a time"
        EventLog(trial.events_file).append("note", text=text)


def unless_out_of_memory(attempt: Callable[[], T]) -> T | None:
    """What `attempt` returns; None where memory ran out."""
    try:
        return attempt()
    except BaseException as error:
        if not is_out_of_memory(error):
            raise
    return None
