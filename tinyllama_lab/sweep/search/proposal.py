"""What Optuna proposed, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from tinyllama_lab.sweep.search.space import Value


@dataclass(frozen=True)
class Proposal:
    """What Optuna proposed under a number, and what became of it."""

    number: int
    params: dict[str, Value]
    key: str | None = None  # of the trial; None where it was never one
    state: str = "running"
    values: tuple[float, ...] = ()
    again: bool = False  # failed for a reason that may go away
    feasible: bool = True  # it keeps all constraints
    rungs: int = 0  # reported so far
