"""Parses the space of a search from overrides: `choice(...)`, `range(...)`, `interval(...)`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from tinyllama_lab.config import schema as config
from tinyllama_lab.config.validate import known_keys, nearest, not_a_choice
from tinyllama_lab.sweep.search.space import Axis, Choice, Condition, Interval, Space, Value
from tinyllama_lab.sweep.settings.compose import groups

PARAMS = "hydra.sweeper.params"
WHEN = "hydra.sweeper.when"


def parse_space(
    typed: Sequence[str], params: Mapping[str, Any], when: Mapping[str, Any]
) -> tuple[Space, list[str]]:
    """Parse the search space of a command.

    Args:
        typed: the overrides of the command; they take precedence over `params`.
        params: the node `hydra.sweeper.params`.
        when: the node `hydra.sweeper.when`.

    Returns:
        The space, and all problems. The space is valid only without problems.
    """
    problems: list[str] = []
    axes: dict[str, Axis] = {}
    shared: list[str] = []
    # what is typed replaces what a file says about the same setting
    keys = {_parse(text).key_or_group for text in typed}
    from_node = [f"{key}={value}" for key, value in _flat(params) if key not in keys]
    for text in [*from_node, *typed]:
        try:
            override = _parse(text)
            if override.is_sweep_override():
                axes[override.key_or_group] = _axis(override)
            else:
                shared.append(text)
        except HydraException:
            problems.append(f"{PARAMS} must hold values as on the command line, got {text!r}")
        except ValueError as error:
            problems.append(str(error))
    if not axes and not problems:
        problems.append(
            "a search needs a setting to search, got single values only; "
            "type for example 'lora.r=choice(4,8,16)'"
        )
    conditions, more = _conditions(when, axes)
    ordered, circle = _ordered(axes, conditions)
    return Space(tuple(ordered), conditions, tuple(shared)), [*problems, *more, *circle]


def _parse(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield key and text of each entry of a mapping that is nested or has dotted keys."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "null" if value is None else str(value)


def _axis(override: Override) -> Axis:
    key, value = override.key_or_group, override.value()
    known = [*known_keys(config.Config), *groups()]
    if key not in known:
        raise ValueError(f"{key} is not a setting{nearest(key, known)}")
    if isinstance(value, IntervalSweep):
        return _interval(key, value)
    if isinstance(value, RangeSweep):
        return _range(key, value)
    return _choice(key, override)


def _interval(key: str, sweep: IntervalSweep) -> Interval:
    low, high, is_integer = sweep.start, sweep.end, _is_integer(key, "an interval")
    if low is None or high is None or not low < high:
        raise ValueError(f"{key} must have an interval from low to high, got {low} to {high}")
    if is_integer and (low != int(low) or high != int(high)):
        raise ValueError(f"{key} must be an integer, got an interval from {low} to {high}")
    log = "log" in sweep.tags
    if log and low <= 0:
        raise ValueError(f"{key} must be above 0 on a logarithmic scale, got a start of {low}")
    return _within(
        Interval(key, float(low), float(high), log, 1.0 if is_integer else None, is_integer)
    )


def _range(key: str, sweep: RangeSweep) -> Interval:
    """Parse a range. As in Hydra, the stop is not part of it."""
    is_integer = _is_integer(key, "a range")
    start, step = float(sweep.start or 0), float(sweep.step or 1)
    # rounded first: 2.1 / 0.3 is 7.000000000000001, of which `ceil` makes 8
    count = math.ceil(round((float(sweep.stop or 0) - start) / step, 9))
    if count < 1:
        raise ValueError(f"{key} must have a range with values in it, got an empty one")
    if is_integer and (start != int(start) or step != int(step)):
        raise ValueError(f"{key} must be an integer, got a range from {start} in steps {step}")
    if "log" in sweep.tags:
        raise ValueError(
            f"{key} cannot have a range on a logarithmic scale; type tag(log, interval(low, high))"
        )
    # a negative step counts downwards, while Optuna needs the lower end first
    ends = (start, start + (count - 1) * step)
    return _within(Interval(key, min(ends), max(ends), False, abs(step), is_integer))


def _choice(key: str, override: Override) -> Choice:
    parsed: Any = override.value()
    # such as `data=glob(*)`: the options of a group that match a pattern
    if isinstance(parsed, Glob):
        texts = [str(name) for name in parsed.filter(groups().get(key, []))]
    else:
        texts = [str(text) for text in override.sweep_string_iterator()]
    if not texts:
        raise ValueError(f"{key} must have values to choose from, got none")
    values: dict[str, Value] = {}
    for text in texts:
        value = _parse(f"{key}={text}").value()
        problem = _problem(key, value)
        if problem:
            raise ValueError(problem)
        simple = value is None or isinstance(value, int | float | str | bool)
        # Optuna stores only simple values, so the text stands for a list
        values.setdefault(text, value if simple else text)  # type: ignore[arg-type]
    return Choice(key, tuple(values.values()), tuple(values))


def _problem(key: str, value: Any) -> str | None:
    options = groups()
    if key not in options:
        return config.value_problem(key, value)
    if value in options[key]:
        return None
    return not_a_choice(key, value, options[key])


def _within(interval: Interval) -> Interval:
    """Return the interval.

    Raises:
        ValueError: the setting cannot take one of the ends.
    """
    for end in (interval.low, interval.high):
        problem = config.value_problem(interval.key, round(end) if interval.is_integer else end)
        if problem:
            raise ValueError(problem)
    return interval


def _is_integer(key: str, function: str) -> bool:
    """Return whether a setting is an integer.

    Raises:
        ValueError: the setting is not a number, so it cannot have `function`.
    """
    kinds = () if key in groups() else config.kinds_of(key)
    if float in kinds:
        return False
    if int in kinds:
        return True
    raise ValueError(f"{key} is not a number, got {function}; type {key}=choice(a,b)")


def _conditions(
    when: Mapping[str, Any], axes: Mapping[str, Axis]
) -> tuple[dict[str, Condition], list[str]]:
    conditions: dict[str, Condition] = {}
    problems = []
    for key, text in _flat(when):
        try:
            conditions[key] = _condition(key, text, axes)
        except (HydraException, ValueError) as error:
            problems.append(f"{WHEN}.{key} must be like quant=nf4,fp4, got {text!r} ({error})")
    return conditions, problems


def _condition(key: str, text: str, axes: Mapping[str, Axis]) -> Condition:
    override = _parse(text)
    parent = axes.get(override.key_or_group)
    if key not in axes:
        raise ValueError(f"{key} is not searched")
    if not isinstance(parent, Choice):
        raise ValueError(f"{override.key_or_group} is not searched as a choice")
    names = [text.partition("=")[2]]
    if override.is_sweep_override():
        names = [str(value) for value in override.sweep_string_iterator()]
    wrong = [name for name in names if name not in parent.texts]
    if wrong:
        raise ValueError(f"{parent.key} is never {', '.join(wrong)}")
    values = [parent.values[parent.texts.index(name)] for name in names]
    return Condition(key, parent.key, tuple(values))


def _ordered(
    axes: Mapping[str, Axis], conditions: Mapping[str, Condition]
) -> tuple[list[Axis], list[str]]:
    """Sort the axes so that each stands behind the one that its condition depends on."""
    graph = {key: [conditions[key].parent] if key in conditions else [] for key in axes}
    try:
        return [axes[key] for key in TopologicalSorter(graph).static_order()], []
    except CycleError:
        return [], [f"{WHEN} must not go in circles, got {', '.join(conditions)}"]
