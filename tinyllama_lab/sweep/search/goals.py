"""The goals of a search: metrics to minimize or maximize, and constraints on metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_lab.config.validate import nearest
from tinyllama_lab.metrics import MAXIMIZE, METRICS, MINIMIZE, Logged

# a metric, a sign and a number, as in `memory/train_peak_mib <= 7000`
_CONSTRAINT = re.compile(r"\s*([\w/.]+)\s*(<=|>=)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True)
class Constraint:
    """A bound on a metric."""

    metric: str
    sign: str  # <= or >=
    bound: float

    def excess(self, value: float) -> float:
        """Return by how much a value breaks the bound; at most 0 if it keeps it."""
        return value - self.bound if self.sign == "<=" else self.bound - value

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Goals:
    """Objectives with their directions, and constraints."""

    objectives: tuple[str, ...]
    directions: tuple[str, ...]
    constraints: tuple[Constraint, ...] = ()

    def values(self, metrics: Mapping[str, float]) -> list[float] | None:
        """Return the values of the objectives; None if one is missing, NaN or infinite."""
        values = [metrics.get(name, math.nan) for name in self.objectives]
        return values if all(map(math.isfinite, values)) else None

    def missing(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the metrics that the goals need and the trial did not log."""
        needed = [*self.objectives, *(constraint.metric for constraint in self.constraints)]
        return [name for name in needed if name not in metrics]

    def excesses(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return by how much each constraint is broken; infinity without a finite metric."""
        return {
            str(constraint): constraint.excess(value) if math.isfinite(value) else math.inf
            for constraint in self.constraints
            for value in [metrics.get(constraint.metric, math.nan)]
        }


def logged_metrics(settings: Mapping[str, Any], cuda: bool) -> list[str]:
    """Return the names of the metrics that every trial with these settings logs."""
    evaluation, data = settings["eval"], settings["data"]
    has_latency, has_text = bool(evaluation["latency_tokens"]), bool(evaluation["generations"])
    conditions = {
        Logged.ALWAYS: True,
        Logged.STEPS: False,  # they have a value for each step, not one for the trial
        **dict.fromkeys((Logged.CHECKS, Logged.BEST), False),  # they describe a choice
        Logged.AFTER_OTHERS: False,  # the first trials of a machine lack it
        Logged.ON_CUDA: cuda,
        Logged.GENERAL_TEXT: bool(evaluation["general"]),
        Logged.GENERATIONS: has_text,
        Logged.INTENTS: has_text and bool(data["columns"]["intent"]),
        Logged.LATENCY: has_latency,
        # an adapter is merged only into unquantized weights
        Logged.MERGED_LATENCY: has_latency and settings["quant"]["kind"] == "none",
    }
    return [metric.name for metric in METRICS.values() if conditions[metric.logged]]


def parse_goals(
    objectives: Sequence[str],
    directions: Sequence[str],
    constraints: Sequence[str],
    logged: Sequence[str],
) -> tuple[Goals, list[str]]:
    """Parse the goals of a search.

    Args:
        objectives: names of metrics.
        directions: `minimize` or `maximize` for each; empty for the direction of each metric.
        constraints: texts such as `memory/train_peak_mib <= 7000`.
        logged: the metrics that every trial logs.

    Returns:
        The goals, and all problems in the texts. The goals are valid only without problems.
    """
    problems = [f"{_OBJECTIVE} {_unknown(n, logged)}" for n in objectives if n not in logged]
    if not objectives or len(set(objectives)) < len(objectives):
        problems.append(f"{_OBJECTIVE} must name one metric or several, got {_shown(objectives)}")
    problems += _direction_problems(directions, len(objectives))
    bounds, more = _parse_constraints(constraints, logged)
    chosen = tuple(directions) or tuple(_direction(name) for name in objectives)
    return Goals(tuple(objectives), chosen, tuple(bounds)), [*problems, *more]


def _direction_problems(directions: Sequence[str], objectives: int) -> Iterator[str]:
    if directions and len(directions) != objectives:
        yield (
            f"hydra.sweeper.direction must name one for each of {objectives} objectives, "
            f"got {_shown(directions)}"
        )
    for direction in directions:
        if direction not in (MINIMIZE, MAXIMIZE):
            hint = nearest(direction, [MINIMIZE, MAXIMIZE])
            yield (
                f"hydra.sweeper.direction must be minimize or maximize, got {direction!r}{hint}"
            )


def _parse_constraints(
    texts: Sequence[str], logged: Sequence[str]
) -> tuple[list[Constraint], list[str]]:
    """Return the valid constraints, and the problems of all of them."""
    constraints: list[Constraint] = []
    problems: list[str] = []
    for text in texts:
        match = _CONSTRAINT.fullmatch(text)
        bound = _number(match[3]) if match else None
        if match is None or bound is None:
            problems.append(
                f"{_CONSTRAINTS} must be like 'memory/train_peak_mib <= 7000' (<= or >=, and a "
                f"plain number), got {text!r}"
            )
        elif match[1] not in logged:
            problems.append(f"{_CONSTRAINTS} {_unknown(match[1], logged)}")
        else:
            constraints.append(Constraint(match[1], match[2], bound))
    return constraints, [*problems, *_contradictions(constraints)]


def _direction(name: str) -> str:
    # an unknown name is a problem that `parse_goals` reports
    return METRICS[name].direction if name in METRICS else MINIMIZE


def _contradictions(constraints: Sequence[Constraint]) -> list[str]:
    problems = []
    for name in dict.fromkeys(constraint.metric for constraint in constraints):
        bounds = [constraint for constraint in constraints if constraint.metric == name]
        most = min((c.bound for c in bounds if c.sign == "<="), default=math.inf)
        least = max((c.bound for c in bounds if c.sign == ">="), default=-math.inf)
        if least > most:
            problems.append(
                f"{_CONSTRAINTS} contradict each other, got {name} at least {least:g} and at most "
                f"{most:g}; leave one of them out"
            )
    return problems


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _unknown(name: str, logged: Sequence[str]) -> str:
    return f"must name a metric that the trials log, got {name!r}{nearest(name, list(logged))}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


_OBJECTIVE, _CONSTRAINTS = "hydra.sweeper.objective", "hydra.sweeper.constraints"
