"""Launchers start a worker for a pack; the scheduler then polls whether it has ended."""

from __future__ import annotations

from collections.abc import Callable
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


def workers(name: str, stopped: Callable[[], bool]) -> Workers:
    """Return the launcher of `hydra/launcher=<name>`; its module is imported only here.

    Args:
        name: the value of `hydra/launcher`.
        stopped: returns whether the driver was asked to stop, for a worker inside the driver,
            which gets no signal.
    """
    if name == "local":
        from tinyllama_lab.sweep.launchers.local import LocalWorkers

        return LocalWorkers()
    if name == "inline":
        from tinyllama_lab.sweep.launchers.inline import InlineWorkers

        return InlineWorkers(stopped)
    raise ConfigError([not_a_choice("hydra/launcher", name, ("inline", "local"))])
