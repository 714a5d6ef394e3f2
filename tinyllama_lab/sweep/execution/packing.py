"""Packs that wait for a place, and which of them, or of those that run, a new trial joins."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tinyllama_lab.sweep.execution.running import Running
from tinyllama_lab.sweep.plan import Planned


@dataclass
class Waiting:
    """A pack that waits for a place."""

    trials: list[Planned]
    takes_more: bool = True

    @property
    def group(self) -> str:
        """What its worker loads."""
        return self.trials[0].group


class Queue:
    """The packs that wait, the next one first."""

    def __init__(self) -> None:
        self._packs: deque[Waiting] = deque()

    def __bool__(self) -> bool:
        return bool(self._packs)

    @property
    def trials(self) -> int:
        """How many wait."""
        return sum(len(waiting.trials) for waiting in self._packs)

    def next(self) -> Waiting:
        """Take the first one out."""
        return self._packs.popleft()

    def add(self, packs: Sequence[list[Planned]]) -> None:
        """Behind all others."""
        self._packs.extend(Waiting(trials) for trials in packs)

    def put_back(self, packs: Sequence[list[Planned]]) -> None:
        """Before all others. Nobody joins them: how many there are may be what killed them."""
        self._packs.extendleft(Waiting(trials, takes_more=False) for trials in reversed(packs))

    def others_wait(self, group: str) -> bool:
        """Whether trials of another base wait for a place."""
        return any(waiting.group != group for waiting in self._packs)

    def assign(self, planned: Planned, running: Sequence[Running], most: int) -> Running | None:
        """The running pack with room that a trial joins; else it waits, with others or alone."""
        group = planned.group
        if not self.others_wait(group):
            for each in running:
                if each.takes_more and each.group == group and len(each.open) < most:
                    return each
        for waiting in self._packs:
            if waiting.takes_more and waiting.group == group and len(waiting.trials) < most:
                waiting.trials.append(planned)
                return None
        self._packs.append(Waiting([planned]))
        return None
