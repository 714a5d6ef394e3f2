"""Parses a question: the settings of a grid, and the comparisons that it makes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from tinyllama_lab.config.axes import flatten_shown, heldout_keys, show, swept_keys
from tinyllama_lab.config.resolve import resolved
from tinyllama_lab.config.schema import Config
from tinyllama_lab.config.validate import not_a_choice
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.report.analysis.contrasts import in_order, name_of, value_pairs
from tinyllama_lab.report.analysis.settings import MARGIN, margin_problem
from tinyllama_lab.report.analysis.statistics import POWER
from tinyllama_lab.study.trial import canonical_json
from tinyllama_lab.sweep.check import check_command, grid_cells
from tinyllama_lab.sweep.plan import check_cells
from tinyllama_lab.sweep.settings.compose import Cell
from tinyllama_lab.sweep.settings.flags import settings_only
from tinyllama_lab.sweep.settings.questions import Tune, expand

USAGE = f'python -m tinyllama_lab ask "lora.r=8,16" margin={MARGIN:g}'
POWERS = (0.5, 0.99)  # the least and the largest power that can be asked for
RUN = ("ask", "true", "false")
_ARGUMENTS = ("margin=", "power=", "run=")
_NEXT_SETTING = re.compile(r"\s+(?=[\w./+~]+=)")


@dataclass(frozen=True)
class AskRequest:
    """The arguments of `ask`, parsed."""

    settings: list[str]
    margin: float = MARGIN  # nats per token
    power: float = POWER
    run: str = RUN[0]

    @classmethod
    def read(cls, words: Sequence[str]) -> AskRequest:
        """Parse the settings of a grid, and those of `ask` itself.

        Raises:
            ConfigError: with all problems of both.
        """
        texts = [_plain(text) for word in words for text in _split_words(word)]
        texts = settings_only("ask", texts, USAGE)  # it is always about a grid
        arguments = dict(text.split("=", 1) for text in texts if text.startswith(_ARGUMENTS))
        settings = [text for text in texts if not text.startswith(_ARGUMENTS)]
        margin, power = _number(arguments, "margin", MARGIN), _number(arguments, "power", POWER)
        run = arguments.get("run", RUN[0]).lower()
        problems = []
        if problem := margin_problem(margin, arguments.get("margin")):
            problems.append(problem)
        if not POWERS[0] <= power <= POWERS[1]:
            problems.append(
                f"power must be from {POWERS[0]} to {POWERS[1]}, got {arguments['power']}; "
                f"type power={POWER:g}"
            )
        if run not in RUN:
            problems.append(not_a_choice("run", arguments["run"], RUN))
        if "seeds=1" in settings:
            problems.append(
                "seeds must be 2 or more in ask, got 1: with one seed the report only says which "
                "loss was lower in this one run; type seeds=3, or leave seeds= out"
            )
        try:
            check_command(["-m", *settings])
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)
        return cls(settings, margin, power, run)

    def fixes(self, key: str) -> bool:
        """Return whether this setting was typed, so that `ask` proposes no other value."""
        return any(text.startswith(f"{key}=") for text in self.settings)


def _plain(text: str) -> str:
    """Strip the plus signs of `+seeds=5` and `++seeds=5`, except from settings of Hydra."""
    plain = text.lstrip("+")
    return text if plain.startswith("hydra") else plain


def _split_words(word: str) -> list[str]:
    """Split `"lora.r=8,16 data.n=64,128"`, quoted as one argument, into two settings."""
    if any(quote in word for quote in "\"'"):  # a quoted path may contain ` name=`
        return [word]
    return [text for text in _NEXT_SETTING.split(word.strip()) if text]


def _number(arguments: Mapping[str, str], name: str, default: float) -> float:
    try:
        return float(arguments.get(name, default))
    except ValueError:
        # NaN fails every bound, so the caller reports it
        return math.nan


@dataclass(frozen=True)
class Question:
    """A grid, and the comparisons that a report makes in it."""

    cells: list[Cell]  # one for each distinct setting
    configs: list[Config]
    tune: Tune | None
    comparisons: list[tuple[str, Any, Any, int]]  # key, its two values, pairs of settings

    @classmethod
    def of(cls, settings: Sequence[str]) -> Question:
        """Return the question of a grid.

        Raises:
            ConfigError: the grid compares nothing, or settings whose losses are not comparable.
        """
        try:
            cells = grid_cells(settings)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([" ".join(str(error).split())]) from None
        # a typed seed fixes the number of runs, which is what `ask` has to compute
        if any(text.startswith("seed=") for cell in cells for text in cell.overrides):
            raise ConfigError(
                ["ask says how many seeds are needed; leave seed= out, or type seeds=3"]
            )
        asked = zip(cells, check_cells(cells), strict=True)
        # equal cells are one setting: `lora.r=8,8` compares nothing
        different = {canonical_json(resolved(config)): (cell, config) for cell, config in asked}
        configs = [config for _, config in different.values()]
        plain = [resolved(config) for config in configs]
        keys = swept_keys(plain) if len(plain) > 1 else []
        if not keys:
            raise ConfigError([f"a question needs two settings or more to compare; type {USAGE}"])
        if others := heldout_keys(keys):
            raise ConfigError(
                [
                    f"ask compares losses on the same held-out tokens, which {', '.join(others)} "
                    "changes; sweep a setting of lora, quant or train, or data.n"
                ]
            )
        comparisons = list(_comparisons(keys, list(map(flatten_shown, plain))))
        cells = [cell for cell, _ in different.values()]
        return cls(cells, configs, expand(cells).tune, comparisons)

    @property
    def first(self) -> Config:
        """The configuration of the first cell, to read the settings that all cells share."""
        return self.configs[0]

    @property
    def pairs(self) -> int:
        """The fewest pairs of settings that a comparison averages over."""
        return min(pairs for *_, pairs in self.comparisons)

    @property
    def words(self) -> str:
        """`rank: 8 → 16; training rows: 1500 → 3000`."""
        return "; ".join(f"{name_of(k)}: {show(a)} → {show(b)}" for k, a, b, _ in self.comparisons)


def _comparisons(
    keys: Sequence[str], flats: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Any, Any, int]]:
    """Yield the pairs of values that a report compares, each with its number of setting pairs."""
    for key in keys:
        other_values: dict[str, set[str]] = {}  # by value, the combinations of the other keys
        for flat in flats:
            others = canonical_json([flat[other] for other in keys if other != key])
            other_values.setdefault(show(flat[key]), set()).add(others)
        for first, second in value_pairs(in_order(flat[key] for flat in flats)):
            # values that never meet with equal other settings are not compared
            if pairs := len(other_values[show(first)] & other_values[show(second)]):
                yield key, first, second, pairs
