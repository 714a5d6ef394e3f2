"""From the cells of a grid to what is left to do: trials, and the packs they go into."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyllama_lab import config
from tinyllama_lab.config import Config
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study import Study
from tinyllama_lab.sweep.compose import Cell
from tinyllama_lab.sweep.identify import Identifier
from tinyllama_lab.sweep.profile import announcement
from tinyllama_lab.trial import SCIENCE, Result, State, Trial, base_config, digest, trial_key

# failures that may go away by themselves; a diverged or invalid trial would only repeat itself
RETRIED = ("killed", "no_base", "oom")


@dataclass(frozen=True)
class Planned:
    """A trial of this command."""

    trial: Trial
    label: str  # what was swept, for people: r=8 n=1500
    config: dict[str, Any] = field(hash=False)
    overrides: tuple[str, ...] = ()

    @property
    def base_key(self) -> str:
        """The evaluation of the base that this trial is compared with."""
        return trial_key(base_config(self.config))

    @property
    def work(self) -> float:
        """Rough cost in forward passes of a row, for the progress bar."""
        train, data = self.config["train"], self.config["data"]
        rows = data["n"] * train["epochs"]
        if train["max_steps"] is not None:
            rows = train["max_steps"] * train["batch_size"]
        return 3.0 * float(rows) + self.scoring_work

    @property
    def scoring_work(self) -> float:
        """The part of `work` that comes after training."""
        scored = self.config["eval"]
        written = (
            scored["generations"] * scored["max_new_tokens"] / 8 + 2 * scored["latency_tokens"]
        )
        return float(self.config["data"]["eval_n"] + written)


@dataclass
class Plan:
    """What a command asks for, and what of it is there already."""

    study: Study
    config: Config  # of the first cell: everything that is not science
    trials: list[Planned]
    todo: list[Planned]
    results: dict[str, Result]  # by key, of the trials that need nothing
    notes: list[str]
    profile: str  # one line: how the model and the data came to be chosen

    def packs(self) -> list[list[Planned]]:
        """The trials that are left, grouped by the base they share."""
        groups: dict[str, list[Planned]] = {}
        for planned in self.todo:
            shared = [planned.config["model"], planned.config["quant"]]
            shared.append(planned.config["train"]["precision"])
            shared.append(planned.base_key)
            groups.setdefault(digest(shared), []).append(planned)
        return list(groups.values())


def check_cells(cells: Sequence[Cell]) -> list[Config]:
    """Every cell's configuration, with the identities of its model and data filled in.

    Raises:
        ConfigError: with the problems of all cells.
    """
    problems: list[str] = []
    configs: list[Config] = []
    for cell in cells:
        try:
            configs.append(config.load(cell.raw))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if len({(c.study, c.sweeps_dir) for c in configs}) > 1:
        raise ConfigError(
            ["study must be the same for all trials of one command; sweep another key"]
        )
    identify = Identifier()
    for each, cell in zip(configs, cells, strict=True):
        identities = identify(each)
        if identities:
            cell.raw["model"]["identity"], cell.raw["data"]["identity"] = identities
    if identify.problems:
        raise ConfigError(identify.problems)
    return configs


def make_plan(cells: Sequence[Cell], configs: Sequence[Config], study: Study) -> Plan:
    """Drop repeated and finished trials; say why anything else is left out or done again."""
    first = configs[0]
    swept = swept_keys([science(cell.raw) for cell in cells])
    line = announcement(first.profile, first.model.name, first.data.name)
    plan = Plan(study, first, [], [], {}, [], line)
    seen: set[str] = set()
    for cell in cells:
        settings = science(cell.raw)
        key = trial_key(settings)
        if key in seen:
            continue
        seen.add(key)
        text = label(settings, swept)
        trial = study.trial(key, folder_name(settings, swept))
        planned = Planned(trial, text, settings, cell.overrides)
        plan.trials.append(planned)
        _sort_in(plan, planned, first.retry)
    return plan


def _sort_in(plan: Plan, planned: Planned, retry: str) -> None:
    result, why = planned.trial.read_result()
    if why:
        plan.notes.append(f"{why}; {planned.label} counts as missing and runs again")
    if result is None or _again(result, retry):
        plan.todo.append(planned)
        return
    plan.results[planned.trial.key] = result
    if result.state is not State.DONE:
        reason = (result.error or {}).get("message", "")
        plan.notes.append(
            f"{planned.label} is {result.state} and is not run again ({reason}); "
            "retry=all runs it once more"
        )


def _again(result: Result, retry: str) -> bool:
    if result.state in (State.DONE, State.PRUNED) or retry == "none":
        return False
    return retry == "all" or (result.error or {}).get("class") in RETRIED


def science(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides the result."""
    return {group: raw[group] for group in SCIENCE}


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"lora": {"r": 8}}` as `{"lora.r": 8}`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def swept_keys(configs: Iterable[dict[str, Any]]) -> list[str]:
    """The keys whose values differ, without those that only follow from another one."""
    flats = [flatten(each) for each in configs]
    names = dict.fromkeys(name for flat in flats for name in flat)
    differ = [n for n in names if len({digest(flat.get(n)) for flat in flats}) > 1]
    for group, leader in (("model", "model.name"), ("data", "data.name"), ("quant", "quant.kind")):
        if leader in differ:
            keep = (leader, "data.n", "quant.double")
            differ = [n for n in differ if n in keep or not n.startswith(f"{group}.")]
    differ = [n for n in differ if not n.endswith((".identity", ".path"))] or differ
    return sorted(differ, key=lambda name: _SHOWN_FIRST.index(name.partition(".")[0]))


def short_name(key: str) -> str:
    """How a key is called in labels and table heads: `lora.r` is `r`, `quant.kind` is `quant`."""
    group, _, name = key.rpartition(".")
    return group if name in ("name", "kind") else name


def show(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def label(settings: dict[str, Any], swept: Sequence[str]) -> str:
    """`r=8 n=1500`; where nothing is swept, the model and the rank."""
    flat = flatten(settings)
    names = list(swept) or ["model.name", "lora.r", "data.n"]
    return " ".join(f"{short_name(n)}={show(flat.get(n))}" for n in names if n in flat)


def folder_name(settings: dict[str, Any], swept: Sequence[str]) -> str:
    """The label as the readable half of a folder's name: `r8-n1500-nf4`."""
    words = [word.split("=", 1) for word in label(settings, swept).split(" ")]
    text = "-".join(name + value if value[:1].isdigit() else value for name, value in words)
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text)[:48].strip("-.+_") or "trial"


def params(planned: Planned, swept: Sequence[str]) -> dict[str, Any]:
    """What MLflow shows as parameters: the swept keys and the dozen that matter."""
    flat = flatten(planned.config)
    return {name: show(flat[name]) for name in dict.fromkeys([*swept, *_SHOWN]) if name in flat}


_SHOWN_FIRST = ("lora", "data", "quant", "train", "model", "eval", "seed")
_SHOWN = (
    "model.name",
    "data.name",
    "data.n",
    "data.eval_n",
    "quant.kind",
    "lora.r",
    "lora.targets",
    "lora.variant",
    "lora.dropout",
    "train.lr",
    "train.epochs",
    "train.batch_size",
    "train.max_steps",
    "seed",
)
