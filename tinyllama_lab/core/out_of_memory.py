"""Recognizes out-of-memory errors and retries with less, before a trial ends as `oom`.

    loading the base       nothing is left to make smaller: its trials end as `oom`
    adding an adapter      it waits until other adapters have left
    a training step        micro-batches of half the tokens, then recomputed activations, then
                           half the adapters; one that is left alone ends as `oom`
    losses, generations    half as much in a forward pass, down to one example
    timing a batch         no measurement: a smaller batch would measure something else

`training.memory.Planner` handles training steps, because it knows what was planned; the
functions here handle the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tinyllama_lab.errors import BaseError, BaseMemoryError
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.trial import TrialFolder

T = TypeVar("T")
_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that PyTorch or Python could not allocate memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def base_error(error: Exception, action: str) -> BaseError:
    """Return the error for the trials of a base; `action` is what failed: loaded or scored."""
    if is_out_of_memory(error):
        return BaseMemoryError(
            f"the base must fit into memory to be {action}, got: {error}; set quant=nf4 or take a "
            "smaller model"
        )
    return BaseError(f"the base could not be {action}: {error}")


def fit(attempt: Callable[[int], T], size: int, least: int, trial: TrialFolder) -> tuple[T, int]:
    """Run `attempt(size)`; halve the size whenever memory runs out.

    Args:
        attempt: a function of how much to do at a time.
        size: the size of the first try.
        least: at this size the error is raised, because less would not save memory.
        trial: its event log gets a note of every retry.

    Returns:
        What `attempt` returned, and the size that it was given.
    """
    while True:
        try:
            return attempt(size), size
        except BaseException as error:
            if not is_out_of_memory(error) or size <= least:
                raise
        # outside the `except` block: there, the traceback would keep the tensors of the failed try
        size //= 2
        text = f"out of memory; trying again with {size} at a time"
        EventLog(trial.events_file).append("note", text=text)


def unless_out_of_memory(attempt: Callable[[], T]) -> T | None:
    """Run `attempt` and return its result, or None if memory ran out."""
    try:
        return attempt()
    except BaseException as error:
        if not is_out_of_memory(error):
            raise
    # outside the `except` block, as in `fit`
    return None
