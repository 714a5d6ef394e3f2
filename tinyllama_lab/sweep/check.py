"""Checks a command line before Hydra does, so that all mistakes come back at once.

Each comes with the nearest word that exists, and nothing was made or loaded by then.
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

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.validate import known_keys, nearest, not_a_choice, way_to_list
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study.files import utf8_problem
from tinyllama_lab.sweep.plan import check_cells
from tinyllama_lab.sweep.search.settings import NAMES, NODE, PRUNERS
from tinyllama_lab.sweep.settings.compose import (
    Cell,
    Composer,
    groups,
    register_resolvers,
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

PLUGINS = {"hydra/launcher": ("local", "inline"), "hydra/sweeper": ("basic", "optuna")}
_KEYS = known_keys(config.Config)
MULTIRUN = ("-m", "--multirun")
MAX_TRIALS = 10_000  # of one command; more is a slip, such as range(1,1e9)


def check_command(arguments: Sequence[str]) -> None:
    """Check every override of a command line.

    Raises:
        ConfigError: with all problems of keys, options, values and their combination.
    """
    parsed = read_flags(with_folders(arguments))
    if parsed.shell_completion:  # its settings are install=bash and the like
        return
    words = split_at_spaces(parsed.overrides)
    typed = [each[0] for each in words if len(each) == 1]
    use_folders_of(typed)
    many = parsed.multirun or any(text.endswith("hydra.mode=MULTIRUN") for text in typed)
    sweeper = _sweeper(typed)
    searching = "n_trials" in sweeper
    problems = [] if searching else list(_problems_of_params(sweeper.get("params") or {}))
    problems += _problems_of_pruning(typed, str(sweeper["pruner"])) if searching else []
    problems += _problems_of_experiments(typed)
    problems += [way_to_join(each) for each in words if len(each) > 1]
    good: list[str] = []
    for text in typed:
        found = list(_problems(text, many, searching))
        problems += found
        if not found:
            good.append(text)
    has_sweep = searching or bool(sweeper.get("params"))
    if has_sweep and not (many or parsed.cfg or parsed.info):
        problems.append(_needs_multirun(typed))
    size = 1 if searching else math.prod(len(_values(_parse(text))) or 1 for text in good)
    if size > MAX_TRIALS:
        problems.append(f"a grid must have at most {MAX_TRIALS} trials, got {size}; sweep less")
    if problems:
        wrong = [text for each in words for text in each if text not in good]
        raise ConfigError(problems + _problems_of_the_rest(good, wrong))


def _problems_of_the_rest(overrides: list[str], wrong: list[str]) -> list[str]:
    """What else is wrong, so that one run shows everything.

    A problem that names a setting among the `wrong` ones is left out: it may be right with it.
    """
    undecided = {_meant(text) for text in wrong}
    if undecided & {"experiment", "profile"}:  # they decide everything
        return []
    single = [text for each in overrides for text in _first_value(each)]
    # of a group that is swept, or mistyped, nobody knows here which settings it uses
    unsure = undecided | {_meant(text) for text in overrides if text not in single}
    found: list[str] = []
    try:
        cell = composed(single)
        found += output_problems(cell.raw, Path.cwd())
        sure = {group: name for group, name in cell.choices.items() if group not in unsure}
        check_cells([replace(cell, choices={} if unsure & {"experiment", "profile"} else sure)])
    except ConfigError as error:
        found += error.problems
    except (HydraException, OmegaConfBaseException) as error:
        found.append(" ".join(str(error).split()))
    return [text for text in found if not _names(text, undecided)]


def _meant(text: str) -> str:
    """The setting that an override sets, or seems to mean."""
    key = text.lstrip("+~").partition("=")[0]
    hint = re.search("'(.+)'", "" if key in _KEYS else hint_to(key))
    return hint[1] if hint else key


def _names(problem: str, keys: Iterable[str]) -> bool:
    """Whether a problem names one of these settings, or one of a group among them."""
    words = (rf"{key}\b" if key in _KEYS else rf"{key}[.=]|the {key}\b" for key in keys)
    return any(re.search(rf"(?<![\w.])(?:{word})", problem) for word in words)


def _first_value(text: str) -> list[str]:
    """The override with the first of its values; none where it has no list of them."""
    override = _parse(text)
    if not override.is_sweep_override():
        return [text]
    first = next(iter(_swept(override)), None)
    return [] if first is None else [f"{override.get_key_element()}={first}"]


def _compose(overrides: list[str]) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        texts = with_search_path(overrides)
        return compose("config", overrides=texts, return_hydra_config=True)


def single_values(typed: Sequence[str]) -> dict[str, list[str]]:
    """By setting, the overrides with one value each that a command goes through.

    Those of the sweep that an experiment holds are among them; an interval has none.
    """
    params = _sweeper(typed).get("params") or {}
    texts = {key: f"{key}={value}" for key, value in params.items()}
    texts |= {_parse(text).key_or_group: text for text in typed}
    found: dict[str, list[str]] = {}
    for key, text in texts.items():
        override = _parse(text)
        is_sweep = override.is_sweep_override()
        found[key] = [f"{key}={value}" for value in _swept(override)] if is_sweep else [text]
    return found


def problems_of_settings(typed: Sequence[str]) -> list[str]:
    """What is wrong with single settings, each of which may have several values."""
    return [problem for text in typed for problem in _problems(text, many=True, searching=False)]


def typed_values(text: str) -> tuple[str, list[Any]]:
    """The setting of an override, and its values."""
    override = _parse(text)
    return override.key_or_group, _values(override)


def composed(overrides: Sequence[str]) -> Cell:
    """The configuration that a command without `-m` would run."""
    return Composer(_compose)(overrides)


def grid_cells(typed: Sequence[str]) -> list[Cell]:
    """The configurations that a command with `-m` would run, one for each that was typed.

    Raises:
        ConfigError: it would search, so that nobody knows them beforehand.
    """
    values = single_values(typed)
    if "n_trials" in _sweeper(typed) or not all(values.values()):
        raise ConfigError(["a search makes its trials as it goes; type lists such as lora.r=8,16"])
    compose_cell = Composer(_compose)
    return [compose_cell(each) for each in product(*values.values())]


def _parse(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def _sweeper(typed: Sequence[str]) -> dict[str, Any]:
    """Who makes the trials and how: an experiment may choose Optuna, and what it searches."""
    known = {"hydra/sweeper": PLUGINS["hydra/sweeper"], "experiment": groups()["experiment"]}
    pairs = [text.partition("=") for text in typed]
    chosen = [f"{key}={value}" for key, _, value in pairs if value in known.get(key, ())]
    return _sweeper_of(tuple(with_search_path(chosen))) if chosen else {}


@lru_cache
def _sweeper_of(chosen: tuple[str, ...]) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(_compose(list(chosen)).hydra.sweeper)
    return dict(found)


def _needs_multirun(typed: Sequence[str]) -> str:
    """Of a file's own sweep, or a search: without `-m` Hydra would run one trial of neither."""
    named = [text for text in typed if text.startswith(("experiment=", "hydra/sweeper="))]
    command = shlex.join(["python", "-m", "tinyllama_lab", "-m", *typed])
    return f"{' '.join(named)} needs -m, because it runs several trials; type {command}"


def _problems_of_experiments(typed: Sequence[str]) -> Iterator[str]:
    """Several in one command, whose own sweeps Hydra would leave out."""
    for text in typed:
        key, _, values = text.partition("=")
        names = values.split(",") if key == "experiment" else []
        known = [name for name in names if name in groups()["experiment"]]
        for name in known if len(names) > 1 else []:
            sweeper = _sweeper_of((f"experiment={name}",))
            if sweeper.get("params") or "n_trials" in sweeper:
                yield (
                    f"experiment={name} holds a sweep of its own, and must stand alone, got "
                    f"{text}; run a command for each"
                )


def _problems_of_pruning(typed: Sequence[str], pruner: str) -> Iterator[str]:
    """Settings of rungs that the pruner does not look at."""
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
    """Of a file's `hydra.sweeper.params`, where a grid is made of them."""
    for key, value in params.items():
        override = _parse(f"{key}={value}")
        if override.is_sweep_override() and not override.is_discrete_sweep():
            yield (
                f"{key} must be a list of values in a grid, got {value!r} in an experiment; "
                "to search, add '- override /hydra/sweeper: optuna' to its defaults"
            )


def _problems(text: str, many: bool, searching: bool) -> Iterator[str]:
    if problem := utf8_problem(text):
        yield problem
        return
    try:
        override = _parse(text)
    except HydraException:
        yield unreadable(text, many)
        return
    key = override.key_or_group
    if not key:
        yield f"{text!r} is not of the form key=value (no key)"
        return
    if key.partition(".")[0].partition("/")[0] == "hydra":
        yield from _problems_of_hydra(key, override, searching)
        return
    options = groups()
    if override.is_add() and key in options:
        yield f"{text!r} must be written without the plus sign; type {text.lstrip('+')!r}"
    elif override.is_sweep_override() and not many:
        rule = f"{key} must have one value without -m, got {text!r}; put -m before the settings"
        yield rule + (_way_to_type_it(text) or _way_to_type_a_list(key, text))
    elif override.is_sweep_override() and searching and key in (*options, *_KEYS):
        return  # the space is checked as a whole
    elif override.is_sweep_override() and not override.is_discrete_sweep():
        yield (
            f"{key} must be a list of values in a grid, got {text!r}; type {key}=a,b,c, or "
            "search with hydra/sweeper=optuna"
        )
    elif _count(override) > MAX_TRIALS:
        yield f"{key} must be swept over at most {MAX_TRIALS} values, got {text!r}"
    elif override.is_delete() and (key in options or key in _KEYS):
        return  # what is then missing shows when the rest is composed
    elif key in options:
        for value in _values(override):
            if value is not None and str(value) not in options[key]:
                yield not_a_choice(key, value, options[key], way_to_name(key, str(value)))
    elif key in _KEYS:
        yield from _problems_of_values(text, override, many)
    else:
        yield f"{key} is not a setting{hint_to(key)}"


def _problems_of_hydra(key: str, override: Override, searching: bool) -> Iterator[str]:
    """Settings of Hydra itself: who runs the trials, and who makes them."""
    if key in PLUGINS and override.value() not in PLUGINS[key]:
        yield not_a_choice(key, override.value(), PLUGINS[key])
    name = key.removeprefix(f"{NODE}.")
    if not searching and name != key and name in NAMES and name != "params":
        yield f"{key} belongs to a search; add hydra/sweeper=optuna"
        return
    if searching and key.startswith(f"{NODE}.") and key.split(".")[2] not in NAMES:
        yield f"{key} is not a setting{nearest(key, [f'{NODE}.{name}' for name in NAMES])}"


def _problems_of_values(text: str, override: Override, many: bool) -> Iterator[str]:
    """The values of a known setting that break its rule."""
    key = override.key_or_group
    plain = [v for v in _values(override) if not (isinstance(v, str) and "${" in v)]
    wrong = {str(v): problem for v in plain if (problem := config.value_problem(key, v))}
    names = [v for v in plain if isinstance(v, str) and v in wrong]
    joined = ",".join(names)
    if len(names) > 1 and way_to_list(key, joined, config.kinds_of(key)):  # [ ] is missing
        yield config.value_problem(key, joined) or ""
        return
    for value in plain:
        if problem := wrong.get(str(value)):
            is_text = isinstance(value, str)
            way = "" if is_text else _way_to_type_it(text, many) or way_without_brackets(text)
            yield problem + way


def _way_to_type_a_list(key: str, text: str) -> str:
    """The end of a message about `lora.targets=q_proj,v_proj`."""
    names, kinds = text.partition("=")[2], config.kinds_of(key) if key in _KEYS else ()
    way = way_to_list(key, names, kinds)
    return f", or for one list of names type {way}" if way else ""


def _way_to_type_it(text: str, is_list: bool = False) -> str:
    """How to type what Hydra took for a number, a list or the like, where a text is meant."""
    key, _, value = text.lstrip("+").partition("=")
    return way_to_type(key, value, is_list) if key in _KEYS else ""


def _values(override: Override) -> list[Any]:
    """The value, or every value that a sweep goes through."""
    if not override.is_sweep_override():
        return [override.value()]
    key = override.get_key_element()
    return [_parse(f"{key}={value}").value() for value in _swept(override)]


def _count(override: Override) -> int:
    """How many values a sweep goes through, `MAX_TRIALS` + 1 where they are more."""
    return sum(1 for _ in islice(_swept(override), MAX_TRIALS + 1))


def _swept(override: Override) -> Iterable[str]:
    """The values of a sweep; none of an interval, a matter for the search, or of a glob."""
    if not override.is_discrete_sweep() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []
    return override.sweep_string_iterator()
