"""Where a worker runs. The scheduler starts one for a pack and asks whether it has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tinyllama_lab.config.validate import not_a_choice
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study.pack import Pack


class Worker(Protocol):
    """One running worker."""

    def exit_code(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""

    def stop(self, patience_s: float) -> None:
        """Ask it to save and end; kill it when that takes longer than `patience_s` seconds."""


class Workers(Protocol):
    """A place that workers run at."""

    def start(self, pack: Pack) -> Worker:
        """Start a worker on a pack folder that is already written."""


def workers(name: str, stopped: Callable[[], bool]) -> Workers:
    """The place that `hydra/launcher=<name>` means; imported only when it is used.

    `stopped` says whether the driver was told to stop, to a worker that cannot get a signal.
    """
    if name == "local":
        from tinyllama_lab.sweep.launchers.local import LocalWorkers

        return LocalWorkers()
    if name == "inline":
        from tinyllama_lab.sweep.launchers.inline import InlineWorkers

        return InlineWorkers(stopped)
    raise ConfigError([not_a_choice("hydra/launcher", name, ("inline", "local"))])
