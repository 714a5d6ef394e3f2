"""The protocol of a source that adds trials while others run, such as a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tinyllama_lab.study.events import Event
from tinyllama_lab.study.pack import StreamSettings
from tinyllama_lab.study.trial import Result
from tinyllama_lab.sweep.plan import Planned


class TrialSource(Protocol):
    """A search or a tuning, which adds trials to a running sweep or prunes them."""

    stream: StreamSettings
    is_quiet: bool  # whether the trials that it prunes are expected and print no line

    @property
    def left(self) -> int:
        """The number of trials that are still to come, as far as it is known."""

    def ask(self, room: int) -> list[Planned]:
        """Return up to `room` more trials; fewer only if no more will come."""

    def at_rungs(self, reached: Sequence[tuple[Planned, Event]]) -> list[tuple[Planned, str]]:
        """Return the running trials to prune, each with the reason.

        Args:
            reached: the trials that reached a rung together, with the event of the rung.
        """

    def ended(self, planned: Planned, result: Result) -> None:
        """Record the result of a trial."""

    def conclude(self) -> dict[str, float]:
        """Store the outcome so far, and return the metrics for the study's run in MLflow."""
