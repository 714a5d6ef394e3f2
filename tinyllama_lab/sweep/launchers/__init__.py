"""Launchers start a worker for a pack; the scheduler then polls whether it has ended.

A launcher is a module of this folder with a function `workers`, and its name in `LAUNCHERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

from tinyllama_lab.config.validate import not_a_choice
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study.pack import Pack


class Worker(Protocol):
    """A worker that was started."""

    def exit_code(self) -> int | None:
        """Return the exit status, negative for a signal; None while the worker runs."""

    def stop(self, patience_s: float) -> None:
        """Ask the worker to save and end; kill it after `patience_s` seconds."""


class Workers(Protocol):
    """Starts workers in one way."""

    def start(self, pack: Pack) -> Worker:
        """Start a worker on a pack folder that is already written."""

    def close(self) -> None:
        """End what was started ahead of its pack and is not needed; workers go on."""


LAUNCHERS = ("local", "inline")  # values of `hydra/launcher`, each a module of this folder


def workers(name: str, stopped: Callable[[], bool]) -> Workers:
    """Return the launcher of `hydra/launcher=<name>`; its module is imported only here.

    Args:
        name: the value of `hydra/launcher`.
        stopped: returns whether the driver was asked to stop, for a worker inside the driver,
            which gets no signal.
    """
    if name not in LAUNCHERS:
        raise ConfigError([not_a_choice("hydra/launcher", name, LAUNCHERS)])
    launched: Workers = import_module(f"{__name__}.{name}").workers(stopped)
    return launched
