"""The space of a search: choices of settings, numbers between bounds, and what depends on what."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from tinyllama_lab.config.axes import show, words

Value = int | float | str | bool | None
_NAME_KEYS = {"model": "model.name", "data": "data.name", "quant": "quant.kind"}


@dataclass(frozen=True)
class Choice:
    """A setting with some values. `texts` are what one types for each of `values`."""

    key: str
    values: tuple[Value, ...]
    texts: tuple[str, ...]

    def text(self, value: Value) -> str:
        """What one types for a value."""
        return self.texts[self.values.index(value)]

    def __str__(self) -> str:
        return f"choice({','.join(self.texts)})"


@dataclass(frozen=True)
class Interval:
    """A number between two bounds, both of which it may take; `step` null is any number."""

    key: str
    low: float
    high: float
    log: bool
    step: float | None
    is_integer: bool

    def text(self, value: Value) -> str:
        """What one types for a value: with six digits, more would decide nothing."""
        assert isinstance(value, int | float)
        if self.is_integer:
            return str(round(value))
        return repr(min(self.high, max(self.low, float(f"{value:.6g}"))))

    def __str__(self) -> str:
        step = f" in steps of {self.step:g}" if self.step else ""
        return f"{self.low!r} to {self.high!r}{step}{', log' if self.log else ''}"


Axis = Choice | Interval


@dataclass(frozen=True)
class Condition:
    """`key` is part of a trial only where `parent` has one of `values`."""

    key: str
    parent: str
    values: tuple[Value, ...]

    def __str__(self) -> str:
        return f"where {self.parent} is {' or '.join(map(show, self.values))}"


@dataclass(frozen=True)
class Space:
    """Axes, parents before those that depend on them, and the settings all trials share."""

    axes: tuple[Axis, ...]
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    shared: tuple[str, ...] = ()

    def applies(self, axis: Axis, params: Mapping[str, Value]) -> bool:
        """Whether a setting exists beside the values chosen so far."""
        condition = self.conditions.get(axis.key)
        if condition is None:
            return True
        return condition.parent in params and params[condition.parent] in condition.values

    def overrides(self, params: Mapping[str, Value]) -> list[str]:
        """What one would type for one trial."""
        chosen = [axis for axis in self.axes if axis.key in params]
        return [*self.shared, *(f"{axis.key}={axis.text(params[axis.key])}" for axis in chosen)]

    def label(self, params: Mapping[str, Value]) -> str:
        """The chosen values, for people."""
        return words(params)

    @property
    def is_finite(self) -> bool:
        """Whether every setting has a list of values."""
        return all(isinstance(axis, Choice) or axis.step for axis in self.axes)

    @property
    def changes_base(self) -> bool:
        """Whether trials may need several bases."""
        keys = {axis.key.partition(".")[0] for axis in self.axes}
        own = {"train.precision", "train.deterministic"} & {axis.key for axis in self.axes}
        return bool(keys & {"model", "quant"} or own)

    def has_at_most(self, count: int) -> bool:
        """Whether a finite space has so many cells or fewer."""
        return sum(1 for _ in islice(self.cells(), count + 1)) <= count

    def cells(self) -> Iterator[dict[str, Value]]:
        """Every combination of a finite space."""
        return self._cells(0, {})

    def _cells(self, depth: int, params: dict[str, Value]) -> Iterator[dict[str, Value]]:
        if depth == len(self.axes):
            yield params
            return
        axis = self.axes[depth]
        if not self.applies(axis, params):
            yield from self._cells(depth + 1, params)
            return
        for value in values_of(axis):
            yield from self._cells(depth + 1, {**params, axis.key: value})

    def samples(self, count: int) -> Iterator[list[str]]:
        """Overrides of random trials, the same for every call; of an interval both ends."""
        dice = random.Random(0)
        for _ in range(count):
            params: dict[str, Value] = {}
            for axis in self.axes:
                if self.applies(axis, params):
                    ends = (axis.low, axis.high) if isinstance(axis, Interval) else axis.values
                    params[axis.key] = dice.choice(ends)
            yield self.overrides(params)

    def swept(self) -> list[str]:
        """The keys that a trial is named by."""
        return [_NAME_KEYS.get(axis.key, axis.key) for axis in self.axes]

    def described(self) -> dict[str, str]:
        """Each axis in words; the order of axes does not count, that of choices does."""
        conditions = {key: f" {condition}" for key, condition in self.conditions.items()}
        return {axis.key: f"{axis}{conditions.get(axis.key, '')}" for axis in self.axes}


def values_of(axis: Axis) -> list[Value]:
    """All values of a finite axis."""
    if isinstance(axis, Choice):
        return list(axis.values)
    assert axis.step
    count = round((axis.high - axis.low) / axis.step) + 1
    found = [axis.low + number * axis.step for number in range(count)]
    return [round(value) if axis.is_integer else float(f"{value:.6g}") for value in found]
