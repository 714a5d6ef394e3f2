"""What a class of faults is, and what came of injecting it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


def lives(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@dataclass
class Count:
    """What happened, by outcome; `wrong` holds a sentence for each that must not happen."""

    injected: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, outcome: str) -> None:
        """Count one more fault that had a right outcome."""
        self.injected += 1
        self.outcomes[outcome] += 1

    def fail(self, what: str) -> None:
        """Count one more fault that had a wrong outcome."""
        self.injected += 1
        self.wrong.append(what)

    def words(self) -> str:
        """Return the outcomes for people."""
        counts = [f"{count:,} {outcome}" for outcome, count in self.outcomes.most_common()]
        return "; ".join([*counts, *self.notes, f"{len(self.wrong)} wrong"])


@dataclass(frozen=True)
class Draw:
    """How many faults to inject, and where.

    Attributes:
        folder: an empty folder.
        dice: decides which faults; a printed seed makes a draw repeatable.
        share: of the faults of a full run.
    """

    folder: Path
    dice: random.Random
    share: float = 1.0

    def times(self, full: int) -> int:
        """Return how many of `full` faults to inject."""
        return max(1, round(full * self.share))


@dataclass(frozen=True)
class FaultClass:
    """A class of faults.

    Attributes:
        name: for the command line.
        what: what is injected, for people.
        run: injects it.
        is_slow: whether `make test` leaves it out, because its smallest draw takes a minute.
    """

    name: str
    what: str
    run: Callable[[Draw], Count]
    is_slow: bool = False
