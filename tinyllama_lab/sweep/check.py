"""Checks a command line before Hydra reads it, and reports all mistakes at once.

Hydra would stop at the first mistake. Each message names the nearest key or option that exists.
Nothing is created or loaded before the check has passed.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf

from tinyllama_lab.config import schema as config
from tinyllama_lab.config.validate import known_keys, not_a_choice, way_to_list
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study.files import utf8_problem
from tinyllama_lab.sweep.guard import (
    PLUGINS,
    compose_checked,
    problems_of_hydra,
    problems_of_value,
)
from tinyllama_lab.sweep.plan import check_cells
from tinyllama_lab.sweep.search.settings import NODE, PRUNERS
from tinyllama_lab.sweep.settings.compose import (
    Cell,
    Composer,
    groups,
    use_folders_of,
    with_search_path,
)
from tinyllama_lab.sweep.settings.flags import read_flags, with_folders
from tinyllama_lab.sweep.settings.typed_paths import way_to_name, way_to_type
from tinyllama_lab.sweep.settings.unreadable import (
    hint_to,
    split_at_spaces,
    unreadable,
    way_to_join,
    way_without_brackets,
)
from tinyllama_lab.sweep.settings.writable import output_problems

_KEYS = known_keys(config.Config)
MAX_TRIALS = 10_000  # of one command; more is a typing error, such as range(1,1e9)


def check_command(arguments: Sequence[str]) -> None:
    """Check every override of a command line.

    Raises:
        ConfigError: with all problems of keys, options, values and their combination.
    """
    parsed = read_flags(with_folders(arguments))
    if parsed.shell_completion:  # its arguments are install=bash and the like, not settings
        return
    words = split_at_spaces(parsed.overrides)
    typed = [parts[0] for parts in words if len(parts) == 1]
    use_folders_of(typed)
    # `hydra.mode=MULTIRUN` is another way to type -m
    is_multirun = parsed.multirun or any(text.endswith("hydra.mode=MULTIRUN") for text in typed)
    sweeper = _sweeper(typed)
    is_search = "n_trials" in sweeper
    problems = [] if is_search else list(_problems_of_params(sweeper.get("params") or {}))
    problems += _problems_of_pruning(typed, str(sweeper["pruner"])) if is_search else []
    problems += _problems_of_experiments(typed)
    problems += [way_to_join(parts) for parts in words if len(parts) > 1]
    valid: list[str] = []
    for text in typed:
        text_problems = list(_problems(text, is_multirun, is_search))
        problems += text_problems
        if not text_problems:
            valid.append(text)
    has_sweep = is_search or bool(sweeper.get("params"))
    # --cfg and --info show a single configuration, so they need no -m
    if has_sweep and not (is_multirun or parsed.cfg or parsed.info):
        problems.append(_needs_multirun(typed))
    # the size of a search is `n_trials`, whatever its space
    size = 1 if is_search else math.prod(len(_values(_parse(text))) or 1 for text in valid)
    if size > MAX_TRIALS:
        problems.append(f"a grid must have at most {MAX_TRIALS} trials, got {size}; sweep less")
    if problems:
        wrong = [text for parts in words for text in parts if text not in valid]
        raise ConfigError(problems + _problems_of_the_rest(valid, wrong))
    # before Hydra makes the objects that it names
    if problems := _problems_of_composing(valid):
        raise ConfigError(problems)


def _problems_of_composing(overrides: list[str]) -> list[str]:
    """Return why a command cannot be composed, with the first value of each list."""
    single = [first for text in overrides for first in _first_value(text)]
    others = [value for text in overrides if "${" in text for value in _each_value(text)]
    try:
        for other in ["", *others]:
            composed([*single, other] if other else single)
    except ConfigError as error:
        return error.problems
    return []


def _each_value(text: str) -> list[str]:
    """Return the override once for every value of its list; empty if it has no list."""
    override = _parse(text)
    return [f"{override.get_key_element()}={value}" for value in _swept(override)]


def _problems_of_the_rest(overrides: list[str], wrong: list[str]) -> list[str]:
    """Return the problems of the settings that parse, so that one run reports everything.

    A problem that names one of the `wrong` settings is left out, because it may disappear once
    that setting is corrected.
    """
    undecided = {_meant(text) for text in wrong}
    if undecided & {"experiment", "profile"}:  # they decide every other default
        return []
    single = [first for text in overrides for first in _first_value(text)]
    # a group that is swept or mistyped has no single option yet, so what it uses is unknown
    unsure = undecided | {_meant(text) for text in overrides if text not in single}
    problems: list[str] = []
    try:
        cell = composed(single)
        problems += output_problems(cell.raw, Path.cwd())
        sure = {group: name for group, name in cell.choices.items() if group not in unsure}
        check_cells([replace(cell, choices={} if unsure & {"experiment", "profile"} else sure)])
    except ConfigError as error:
        problems += error.problems
    return [text for text in problems if not _names(text, undecided)]


def _meant(text: str) -> str:
    """Return the key that an override sets, or the nearest existing key if it is mistyped."""
    key = text.lstrip("+~").partition("=")[0]
    hint = re.search("'(.+)'", "" if key in _KEYS else hint_to(key))
    return hint[1] if hint else key


def _names(problem: str, keys: Iterable[str]) -> bool:
    """Return whether a problem names one of `keys`, or a setting of a group among them."""
    spelled = ((key in _KEYS, re.escape(key)) for key in keys)  # anything may have been typed
    words = (rf"{key}\b" if is_key else rf"{key}[.=]|the {key}\b" for is_key, key in spelled)
    return any(re.search(rf"(?<![\w.])(?:{word})", problem) for word in words)


def _first_value(text: str) -> list[str]:
    """Return the override with the first of its values; empty if it has no list of values."""
    override = _parse(text)
    if not override.is_sweep_override():
        return [text]
    # the values of a sweep may be a range, which is not expanded for this
    first = next(iter(_swept(override)), None)
    return [] if first is None else [f"{override.get_key_element()}={first}"]


def single_values(typed: Sequence[str]) -> dict[str, list[str]]:
    """Return, by key, the single-value overrides that a command goes through.

    The sweep that an experiment file holds is included. An interval has no list of values, so its
    key maps to an empty list.
    """
    params = _sweeper(typed).get("params") or {}
    texts = {key: f"{key}={value}" for key, value in params.items()}
    texts |= {_parse(text).key_or_group: text for text in typed}
    values: dict[str, list[str]] = {}
    for key, text in texts.items():
        override = _parse(text)
        is_sweep = override.is_sweep_override()
        values[key] = [f"{key}={value}" for value in _swept(override)] if is_sweep else [text]
    return values


def problems_of_settings(typed: Sequence[str]) -> list[str]:
    """Return the problems of overrides, each checked by itself; each may list several values."""
    return [
        problem for text in typed for problem in _problems(text, is_multirun=True, is_search=False)
    ]


def typed_values(text: str) -> tuple[str, list[Any]]:
    """Return the key of an override, and its values."""
    override = _parse(text)
    return override.key_or_group, _values(override)


def composed(overrides: Sequence[str]) -> Cell:
    """Return the configuration that a command without `-m` would run."""
    return Composer(compose_checked)(overrides)


def grid_cells(typed: Sequence[str]) -> list[Cell]:
    """Return the configurations that a command with `-m` would run, before seeds and tuning.

    Raises:
        ConfigError: the command is a search, whose trials are not known beforehand.
    """
    values = single_values(typed)
    if "n_trials" in _sweeper(typed) or not all(values.values()):
        raise ConfigError(
            ["a search proposes its trials while it runs; type lists such as lora.r=8,16"]
        )
    compose_cell = Composer(compose_checked)
    return [compose_cell(overrides) for overrides in product(*values.values())]


def _parse(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def _sweeper(typed: Sequence[str]) -> dict[str, Any]:
    """Return the node `hydra.sweeper`, which an experiment file may have set; else empty."""
    known = {"hydra/sweeper": PLUGINS["hydra/sweeper"], "experiment": groups()["experiment"]}
    pairs = [text.partition("=") for text in typed]
    chosen = [f"{key}={value}" for key, _, value in pairs if value in known.get(key, ())]
    return _sweeper_of(tuple(with_search_path(chosen))) if chosen else {}


@lru_cache
def _sweeper_of(chosen: tuple[str, ...]) -> dict[str, Any]:
    node: Any = OmegaConf.to_container(compose_checked(list(chosen)).hydra.sweeper)
    return dict(node)


def _needs_multirun(typed: Sequence[str]) -> str:
    """Return the problem of a search, or of an experiment with a sweep, without `-m`.

    Hydra ignores the sweeper without `-m` and would run a single trial.
    """
    reasons = [text for text in typed if text.startswith(("experiment=", "hydra/sweeper="))]
    command = shlex.join(["python", "-m", "tinyllama_lab", "-m", *typed])
    return f"{' '.join(reasons)} needs -m, because it runs several trials; type {command}"


def _problems_of_experiments(typed: Sequence[str]) -> Iterator[str]:
    """Yield the problems of several experiments in one command: Hydra would drop their sweeps."""
    for text in typed:
        key, _, values = text.partition("=")
        names = values.split(",") if key == "experiment" else []
        known = [name for name in names if name in groups()["experiment"]]
        for name in known if len(names) > 1 else []:
            sweeper = _sweeper_of((f"experiment={name}",))
            if sweeper.get("params") or "n_trials" in sweeper:
                yield (
                    f"experiment={name} contains a sweep and must be the only experiment, got "
                    f"{text}; run one command for each"
                )


def _problems_of_pruning(typed: Sequence[str], pruner: str) -> Iterator[str]:
    """Yield the problems of rung settings that the chosen pruner does not use."""
    values = dict(text.partition("=")[::2] for text in typed)
    pruner = values.get(f"{NODE}.pruner", pruner)
    halves = ("halving", "hyperband")
    for name, pruners in (
        ("rungs", PRUNERS[1:]),
        ("rung_rows", PRUNERS[1:]),
        ("reduction_factor", halves),
    ):
        if f"{NODE}.{name}" in values and pruner in PRUNERS and pruner not in pruners:
            yield (
                f"{NODE}.{name} has no effect with {NODE}.pruner={pruner}; "
                f"leave it out, or set {NODE}.pruner={pruners[0]}"
            )


def _problems_of_params(params: dict[str, Any]) -> Iterator[str]:
    """Yield the problems of a grid that an experiment file holds in `hydra.sweeper.params`."""
    for key, value in params.items():
        override = _parse(f"{key}={value}")
        if override.is_sweep_override() and not override.is_discrete_sweep():
            yield (
                f"{key} must be a list of values in a grid, got {value!r} in an experiment; "
                "to search, add '- override /hydra/sweeper: optuna' to its defaults"
            )


def _problems(text: str, is_multirun: bool, is_search: bool) -> Iterator[str]:
    if problem := utf8_problem(text):
        yield problem
        return
    try:
        override = _parse(text)
    except HydraException:
        yield unreadable(text, is_multirun)
        return
    key = override.key_or_group
    value = text.partition("=")[2] if override.is_sweep_override() else override.value()
    yield from problems_of_value(key, value)
    if not key:
        yield f"{text!r} is not of the form key=value (no key)"
        return
    if key.partition(".")[0].partition("/")[0] == "hydra":
        yield from problems_of_hydra(key, override, is_search)
        return
    options = groups()
    if override.is_add() and key in options:
        yield f"{text!r} must be written without the plus sign; type {text.lstrip('+')!r}"
    elif override.is_sweep_override() and is_multirun and is_search and key in (*options, *_KEYS):
        return  # `check_search` checks the whole space
    elif problem := _problem_of_sweep(text, override, is_multirun):
        yield problem
    elif override.is_delete() and (key in options or key in _KEYS):
        return  # if the deleted setting is needed, composing the rest reports it
    elif key in options:
        for value in _values(override):
            if value is not None and str(value) not in options[key]:
                yield not_a_choice(key, value, options[key], way_to_name(key, str(value)))
    elif key in _KEYS:
        yield from _problems_of_values(text, override, is_multirun)
    else:
        yield f"{key} is not a setting{hint_to(key)}"


def _problem_of_sweep(text: str, override: Override, is_multirun: bool) -> str | None:
    """Return the problem of a list of values, before its values are checked, or None."""
    key = override.key_or_group
    if not override.is_sweep_override():
        return None
    if not is_multirun:
        rule = f"{key} must have one value without -m, got {text!r}; put -m before the settings"
        return rule + (_way_to_type_it(text) or _way_to_type_a_list(key, text))
    if not override.is_discrete_sweep():
        return (
            f"{key} must be a list of values in a grid, got {text!r}; type {key}=a,b,c, or "
            "search with hydra/sweeper=optuna"
        )
    if _count(override) > MAX_TRIALS:
        return f"{key} must be swept over at most {MAX_TRIALS} values, got {text!r}"
    return None


def _problems_of_values(text: str, override: Override, is_multirun: bool) -> Iterator[str]:
    """Yield the problems of the values of a known setting."""
    key = override.key_or_group
    # the schema checks an interpolation such as `${data.n}` after it is resolved
    plain = [v for v in _values(override) if not (isinstance(v, str) and "${" in v)]
    wrong = {str(v): problem for v in plain if (problem := config.value_problem(key, v))}
    names = [v for v in plain if isinstance(v, str) and v in wrong]
    joined = ",".join(names)
    # several names for a setting that takes a list: its brackets are missing, so report them once
    if len(names) > 1 and way_to_list(key, joined, config.kinds_of(key)):
        yield config.value_problem(key, joined) or ""
        return
    for value in plain:
        if problem := wrong.get(str(value)):
            is_text = isinstance(value, str)
            way = (
                "" if is_text else _way_to_type_it(text, is_multirun) or way_without_brackets(text)
            )
            yield problem + way


def _way_to_type_a_list(key: str, text: str) -> str:
    """Return the end of a message about a list without brackets: `lora.targets=q_proj,v_proj`."""
    names, kinds = text.partition("=")[2], config.kinds_of(key) if key in _KEYS else ()
    way = way_to_list(key, names, kinds)
    return f", or for one list of names type {way}" if way else ""


def _way_to_type_it(text: str, is_list: bool = False) -> str:
    """Return how to type a string that Hydra would parse as a number, a list or the like."""
    key, _, value = text.lstrip("+").partition("=")
    return way_to_type(key, value, is_list) if key in _KEYS else ""


def _values(override: Override) -> list[Any]:
    """Return the value of an override, or every value of a sweep."""
    if not override.is_sweep_override():
        return [override.value()]
    key = override.get_key_element()
    # Hydra yields the values of a sweep as texts, as they would be typed alone
    return [_parse(f"{key}={value}").value() for value in _swept(override)]


def _count(override: Override) -> int:
    """Return the number of values of a sweep, at most `MAX_TRIALS` + 1."""
    return sum(1 for _ in islice(_swept(override), MAX_TRIALS + 1))


def _swept(override: Override) -> Iterable[str]:
    """Return the values of a sweep; empty for an interval (only a search has them) and a glob."""
    if not override.is_discrete_sweep() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []
    return override.sweep_string_iterator()
