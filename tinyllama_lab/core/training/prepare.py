"""Prepares the data of a trial, with room for what is written after its prompts."""

from __future__ import annotations

from dataclasses import replace

from tinyllama_lab.config.schema import DataConfig, EvalConfig
from tinyllama_lab.core.dataset.dataset import DataCache, Prepared
from tinyllama_lab.core.dataset.lengths import Continued, check_room, room_after_prompts
from tinyllama_lab.core.evaluation import latency
from tinyllama_lab.errors import DataError, TooLongError


def prepare(cache: DataCache, data: DataConfig, settings: EvalConfig, seed: int = 0) -> Prepared:
    """Return the data of a trial, and check that prompts leave room for generated tokens.

    Raises:
        DataError: the data cannot be read, or does not fit the model.
    """
    try:
        prepared = cache.prepare(data, seed, settings.rows)
    except TooLongError as error:
        shorter = replace(data, max_length=error.max_length)
        try:
            prepared = cache.prepare(shorter, seed, settings.rows)
        except DataError:  # such as too few rows that are left
            raise error from None
        room = room_after_prompts(_continued(prepared, settings), cache.positions)
        raise error.with_settings(room) from None
    check_room(_continued(prepared, settings), cache.positions)
    return prepared


def _continued(prepared: Prepared, settings: EvalConfig) -> Continued:
    """Return the held-out examples that are continued, and by how many tokens."""
    rows = prepared.heldout
    continued = {"eval.max_new_tokens": (rows[: settings.generations], settings.max_new_tokens)}
    if settings.latency_tokens:
        timed = latency.prompts(rows, settings.latency_batch)
        continued["eval.latency_tokens"] = (timed, settings.latency_tokens)
    return continued
