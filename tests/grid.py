"""Cells for tests: composed from the real `conf/`, as a command composes them, but small."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.config import schema as config
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.plan import Plan, make_plan
from tinyllama_lab.sweep.settings.compose import Cell, Composer, register_resolvers

SMALL = (
    "model=tiny_random",
    "data=travel",
    "data.n=16",
    "data.eval_n=8",
    "eval.generations=2",
    "eval.max_new_tokens=8",
    "eval.latency_tokens=0",
    "seeds=1",
    "confirm=off",
)


def hydra_config(overrides: list[str]) -> DictConfig:
    """What Hydra itself composes, without its own node."""
    composed = _with_hydra(overrides).copy()
    with open_dict(composed):
        composed.pop("hydra")
    return composed


def _with_hydra(overrides: list[str]) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", overrides=overrides, return_hydra_config=True)


@cache
def _hydra_config(overrides: tuple[str, ...]) -> DictConfig:
    return hydra_config(list(overrides))


COMPOSER = Composer(_with_hydra)


def plain(*overrides: str) -> dict[str, Any]:
    """One configuration as plain dictionaries; the caller may change it."""
    raw: Any = OmegaConf.to_container(_hydra_config(overrides), resolve=True)
    return copy.deepcopy(raw)


def cells(*overrides: str) -> list[Cell]:
    """The cells of a multirun: `cells("lora.r=4,8", "seed=0,1")` are four."""
    return copy.deepcopy(_cells(overrides))


@cache
def _cells(overrides: tuple[str, ...]) -> list[Cell]:
    parsed = OverridesParser.create().parse_overrides([*SMALL, "tracking=none", *overrides])
    return [COMPOSER(each) for each in BasicSweeper.split_arguments(parsed, None)[0]]


def plan(root: Path, *overrides: str) -> Plan:
    """What a multirun would do in the study `s` below `root`; no model or data is looked at."""
    made = cells("study=s", f"sweeps_dir={root}", *overrides)
    return make_plan(made, [config.load(cell.raw) for cell in made], StudyFolder(root, "s"))
