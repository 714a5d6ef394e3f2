"""Silences messages of transformers about loading that a user can do nothing about."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Turn off the progress bars of transformers inside the block, and on again after it."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@contextmanager
def no_peft_deprecation() -> Iterator[None]:
    """Ignore one warning inside the block: PEFT reads a deprecated property of the model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


@contextmanager
def no_bias_warning() -> Iterator[None]:
    """Ignore one warning inside the block: PEFT does not know that biases are given back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
        yield
