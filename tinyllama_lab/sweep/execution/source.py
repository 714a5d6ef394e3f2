"""Where trials come from while others run: what a search is to the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tinyllama_lab.study.events import Event
from tinyllama_lab.study.pack import StreamSettings
from tinyllama_lab.study.trial import Result
from tinyllama_lab.sweep.plan import Planned


class TrialSource(Protocol):
    """A search, or anything else that asks for trials one after another."""

    stream: StreamSettings
    is_quiet: bool  # the trials that it ends are part of its work, and get no line each

    @property
    def left(self) -> int:
        """How many more are still to come, as far as that is known."""

    def ask(self, room: int) -> list[Planned]:
        """At most `room` more trials; none where no more will come."""

    def at_rungs(self, reached: Sequence[tuple[Planned, Event]]) -> list[tuple[Planned, str]]:
        """The trials that are to be ended, among all that run, and why."""

    def ended(self, planned: Planned, result: Result) -> None:
        """A trial has its result."""

    def conclude(self) -> dict[str, float]:
        """Write down what came out so far; what of it the study's own run shows."""
