"""The queue of packs that wait for a slot, and the pack that a new trial joins."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tinyllama_lab.sweep.execution.running import Running
from tinyllama_lab.sweep.plan import Planned


@dataclass
class Waiting:
    """A pack that waits for a slot."""

    trials: list[Planned]
    takes_more: bool = True

    @property
    def group(self) -> str:
        """What its worker loads; see `Planned.group`."""
        return self.trials[0].group


class Queue:
    """The packs that wait, the next one to run first."""

    def __init__(self) -> None:
        self._packs: deque[Waiting] = deque()

    def __bool__(self) -> bool:
        return bool(self._packs)

    @property
    def trials(self) -> int:
        """The number of trials that wait."""
        return sum(len(waiting.trials) for waiting in self._packs)

    def next(self) -> Waiting:
        """Remove and return the first pack."""
        return self._packs.popleft()

    def add(self, packs: Sequence[list[Planned]]) -> None:
        """Append packs."""
        self._packs.extend(Waiting(trials) for trials in packs)

    def put_back(self, packs: Sequence[list[Planned]]) -> None:
        """Put packs at the front. No trial joins them: their size may have killed the worker."""
        # `extendleft` turns the order around
        self._packs.extendleft(Waiting(trials, takes_more=False) for trials in reversed(packs))

    def others_wait(self, group: str) -> bool:
        """Return whether trials of another base wait for a slot."""
        return any(waiting.group != group for waiting in self._packs)

    def assign(self, planned: Planned, running: Sequence[Running], most: int) -> Running | None:
        """Return the running pack that a trial joins, or queue it and return None.

        Args:
            planned: the new trial.
            running: the packs that run.
            most: the most trials in a pack.
        """
        group = planned.group
        # a running pack that grows keeps its slot, so it must not make another base wait
        if not self.others_wait(group):
            for pack in running:
                if pack.takes_more and pack.group == group and len(pack.open) < most:
                    return pack
        for waiting in self._packs:
            # a pack that still waits can grow without costing a slot
            if waiting.takes_more and waiting.group == group and len(waiting.trials) < most:
                waiting.trials.append(planned)
                return None
        self._packs.append(Waiting([planned]))
        return None
