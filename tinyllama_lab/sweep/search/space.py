"""The space of a search: choices, intervals of numbers, and conditions between settings."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from tinyllama_lab.config.axes import show, words
from tinyllama_lab.study.pack import BaseSettings

Value = int | float | str | bool | None
# the key that names a trial by an option of a group
_NAME_KEYS = {"model": "model.name", "data": "data.name", "quant": "quant.kind"}


@dataclass(frozen=True)
class Choice:
    """A setting with a list of values. `texts` are the values as they are typed."""

    key: str
    values: tuple[Value, ...]
    texts: tuple[str, ...]

    def text(self, value: Value) -> str:
        """Return a value as it is typed."""
        return self.texts[self.values.index(value)]

    def __str__(self) -> str:
        return f"choice({','.join(self.texts)})"


@dataclass(frozen=True)
class Interval:
    """A number between two bounds, both included; any number if `step` is None."""

    key: str
    low: float
    high: float
    log: bool
    step: float | None
    is_integer: bool

    def text(self, value: Value) -> str:
        """Return a value as it is typed, with six digits: more would not change a result."""
        assert isinstance(value, int | float)
        if self.is_integer:
            return str(round(value))
        # rounding may have crossed a bound
        return repr(min(self.high, max(self.low, float(f"{value:.6g}"))))

    def __str__(self) -> str:
        step = f" in steps of {self.step:g}" if self.step else ""
        return f"{self.low!r} to {self.high!r}{step}{', log' if self.log else ''}"


Axis = Choice | Interval


@dataclass(frozen=True)
class Condition:
    """The setting `key` is part of a trial only if `parent` has one of `values`."""

    key: str
    parent: str
    values: tuple[Value, ...]

    def __str__(self) -> str:
        return f"where {self.parent} is {' or '.join(map(show, self.values))}"


@dataclass(frozen=True)
class Space:
    """The axes, each behind the one it depends on, and the overrides that all trials share."""

    axes: tuple[Axis, ...]
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    shared: tuple[str, ...] = ()

    def applies(self, axis: Axis, params: Mapping[str, Value]) -> bool:
        """Return whether a setting is part of a trial with the values chosen so far."""
        condition = self.conditions.get(axis.key)
        if condition is None:
            return True
        # a parent that is itself left out is in no trial
        return condition.parent in params and params[condition.parent] in condition.values

    def overrides(self, params: Mapping[str, Value]) -> list[str]:
        """Return the overrides of one trial."""
        chosen = [axis for axis in self.axes if axis.key in params]
        return [*self.shared, *(f"{axis.key}={axis.text(params[axis.key])}" for axis in chosen)]

    def label(self, params: Mapping[str, Value]) -> str:
        """Return the chosen values as a label."""
        return words(params)

    @property
    def is_finite(self) -> bool:
        """Whether every axis has a finite number of values."""
        return all(isinstance(axis, Choice) or axis.step for axis in self.axes)

    @property
    def changes_base(self) -> bool:
        """Whether trials may need different bases."""
        return any(BaseSettings.has_setting(axis.key) for axis in self.axes)

    def has_at_most(self, count: int) -> bool:
        """Return whether a finite space has at most `count` cells."""
        return sum(1 for _ in islice(self.cells(), count + 1)) <= count

    def cells(self) -> Iterator[dict[str, Value]]:
        """Yield every combination of a finite space."""
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
        """Yield overrides of random trials, the same ones in every call.

        Only the two ends of an interval are drawn.
        """
        # a fixed seed: the same command must get the same problems
        dice = random.Random(0)
        for _ in range(count):
            params: dict[str, Value] = {}
            for axis in self.axes:
                if self.applies(axis, params):
                    ends = (axis.low, axis.high) if isinstance(axis, Interval) else axis.values
                    params[axis.key] = dice.choice(ends)
            yield self.overrides(params)

    def swept(self) -> list[str]:
        """Return the keys whose values name a trial."""
        return [_NAME_KEYS.get(axis.key, axis.key) for axis in self.axes]

    def described(self) -> dict[str, str]:
        """Return each axis in words, by key.

        A search continues only with equal words: the order of axes does not matter, that of the
        values of a choice does.
        """
        conditions = {key: f" {condition}" for key, condition in self.conditions.items()}
        return {axis.key: f"{axis}{conditions.get(axis.key, '')}" for axis in self.axes}


def values_of(axis: Axis) -> list[Value]:
    """Return all values of a finite axis."""
    if isinstance(axis, Choice):
        return list(axis.values)
    assert axis.step
    count = round((axis.high - axis.low) / axis.step) + 1
    values = [axis.low + number * axis.step for number in range(count)]
    # six digits: 0.1 + 2 * 0.1 is 0.30000000000000004
    return [round(value) if axis.is_integer else float(f"{value:.6g}") for value in values]
