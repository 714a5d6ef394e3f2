"""Expands the cells of a grid by seeds and by the values of tuned settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Any

from tinyllama_lab.config.axes import flatten, show
from tinyllama_lab.config.schema import Config, kinds_of, value_problem
from tinyllama_lab.config.validate import known_keys, nearest
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.sweep.settings.compose import Cell

LADDER = (1 / 3, 1.0, 3.0)  # default values to tune over, as factors of the value that is set
TUNABLE = ("lora", "quant", "train")  # losses of other models or data are not comparable
_KNOWN = known_keys(Config)


@dataclass(frozen=True)
class Tune:
    """The values that are tried for every setting and seed of a grid."""

    values: Mapping[str, Sequence[Any]]
    budget: float  # full training runs for one setting and seed

    @property
    def candidates(self) -> int:
        """The number of combinations that are tried for one setting and seed."""
        return math.prod(map(len, self.values.values()))

    @property
    def kept(self) -> list[int]:
        """The number of candidates in each round of the halving, down to one."""
        counts = [self.candidates]
        while counts[-1] > 1:
            counts.append((counts[-1] + 1) // 2)
        return counts

    @property
    def rungs(self) -> tuple[float, ...]:
        """The shares of its steps after which a candidate is judged.

        The rounds are equally long. With a round of length s, all of them together cost
        `1 + s * sum(candidates of a round - 1)` full runs, which is the budget.
        """
        others = [count - 1 for count in self.kept[:-1]]
        if not others:
            return ()
        share = (self.budget - 1) / sum(others)
        # a rung at the end of training would end nobody early
        return tuple(n * share for n in range(1, len(others) + 1) if n * share < 1)


@dataclass(frozen=True)
class ExpandedGrid:
    """The cells of a grid for every seed and tuned value, with notes for the user."""

    cells: list[Cell]
    tune: Tune | None
    notes: list[str]


def expand(cells: Sequence[Cell]) -> ExpandedGrid:
    """Return every cell with each of its seeds and tuned values.

    The candidates of one setting and seed are neighbours, so that they train together.

    Raises:
        ConfigError: `seeds`, `tune` or `tune_values` contradict other settings.
    """
    seeded, notes = _with_seeds(cells)
    tune = _tune_of(cells)
    if tune is None:
        return ExpandedGrid(seeded, None, notes)
    tuned = [
        reduce(lambda made, pair: made.changed(*pair), zip(tune.values, values, strict=True), cell)
        for cell in seeded
        for values in product(*tune.values.values())
    ]
    tried = "; ".join(f"{k}: {', '.join(map(show, values))}" for k, values in tune.values.items())
    return ExpandedGrid(tuned, tune, [*notes, f"each setting at the best of {tried}"])


def _with_seeds(cells: Sequence[Cell]) -> tuple[list[Cell], list[str]]:
    """Repeat each cell with `seeds` seeds, if there are several settings and no typed seed."""
    first = cells[0]
    count = first.raw.get("seeds", 1)
    settings = {json.dumps(cell.raw, sort_keys=True, default=str) for cell in cells}
    has_seed = any(text.startswith("seed=") for cell in cells for text in cell.overrides)
    if has_seed and count != 1 and any(text.startswith("seeds=") for text in first.overrides):
        raise ConfigError(["seeds has no effect with seed=...; leave one of them out"])
    # the schema reports invalid values later; `True` is an int, but no number of seeds
    is_sound = type(count) is int and count > 1 and type(first.raw.get("seed")) is int
    # a single setting is trained once: there is nothing to compare
    if has_seed or len(settings) < 2 or not is_sound:
        return list(cells), []
    seeds = range(first.raw["seed"], first.raw["seed"] + count)
    names = ", ".join(map(str, seeds)) if count <= 5 else f"{seeds[0]} to {seeds[-1]}"
    note = f"each setting is trained with the seeds {names}; seeds=1 trains it once"
    return [cell.changed("seed", seed) for cell in cells for seed in seeds], [note]


def _tune_of(cells: Sequence[Cell]) -> Tune | None:
    """Return what `tune` requests, or None.

    Raises:
        ConfigError: a setting cannot be tuned, or its values are missing.
    """
    raw = cells[0].raw
    keys = [raw["tune"]] if isinstance(raw.get("tune"), str) else list(raw.get("tune") or [])
    if not keys:
        if raw.get("tune_values"):
            raise ConfigError(["tune_values has no effect without tune; type tune=train.lr"])
        return None
    problems = [problem for key in keys if (problem := _problem(key, cells))]
    if not problems and len(keys) > 1 and raw["tune_values"]:
        problems.append(
            f"tune_values belong to one setting, got tune={','.join(keys)}; tune one setting, or "
            "leave tune_values out"
        )
    if problems:
        raise ConfigError(problems)
    values = {key: _values(key, cells) for key in keys}
    return Tune(values, float(raw["tune_budget"]))


def _problem(key: str, cells: Sequence[Cell]) -> str | None:
    """Return why a setting cannot be tuned, or None."""
    if key not in _KNOWN:
        return f"tune must name a setting, got {key!r}{nearest(key, _KNOWN)}"
    if key.partition(".")[0] not in TUNABLE:
        return f"tune must name a setting of {', '.join(TUNABLE)}, got {key}; type tune=train.lr"
    if len({show(flatten(cell.raw).get(key)) for cell in cells}) > 1:
        return f"{key} cannot be both swept and tuned; leave out one of the two"
    return None


def _values(key: str, cells: Sequence[Cell]) -> list[Any]:
    """Return the distinct values of a tuned setting.

    Raises:
        ConfigError: they are invalid, or there are none and the setting is not a number.
    """
    default, values = flatten(cells[0].raw).get(key), cells[0].raw["tune_values"]
    is_whole = float not in kinds_of(key)
    if values is None:
        if isinstance(default, bool) or not isinstance(default, int | float) or default <= 0:
            raise ConfigError([f"tune={key} needs values to try; type tune_values=[...]"])
        values = [
            default if factor == 1 else float(f"{default * factor:.2g}") for factor in LADDER
        ]
        values = [max(1, round(value)) for value in values] if is_whole else values
    elif is_whole:
        # typed as 8.0, which an integer setting refuses
        values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    if problems := [problem for value in values if (problem := value_problem(key, value))]:
        raise ConfigError([f"tune_values: {problem}" for problem in problems])
    if len(set(values)) < 2:
        raise ConfigError([f"tune={key} needs two values or more, got tune_values={values}"])
    # rounding may have made two values of the ladder equal
    return list(dict.fromkeys(values))
