"""The settings of a round on the command line, and the configurations that they compose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.job import Adapter, BenchmarkError, Round, Setup
from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.data.sources import read_file
from tinyllama_lab.sweep.settings.compose import Cell, Composer, register_resolvers

_COLUMNS = (  # names of prompt, context and response in public data sets
    {"prompt": "instruction", "context": "input", "response": "output"},
    {"prompt": "prompt", "response": "response"},
    {"messages": "messages", "prompt": "null", "response": "null"},
)


def overrides(setup: Setup, rows: int, batch_size: int) -> list[str]:
    """Return the settings that all trials of a round share, as typed on the command line."""
    settings = [
        f"model={setup.model}",
        *(_data_overrides(Path(setup.data)) if setup.data else ["data=travel"]),
        f"data.n={rows}",
        f"data.eval_n={setup.eval_rows}",
        f"quant={setup.quant}",
        f"lora.variant={setup.lora_variant}",
        "lora.alpha=null",  # 2 r, as for the peers
        f"train.batch_size={batch_size}",
        "train.epochs=1",
        "eval.generations=0",
        "eval.latency_tokens=0",
        "confirm=off",  # the peers train the trials of the grid and no others
        f"hardware.device={setup.device}",
    ]
    if setup.model_path:
        settings.append(f"model.path={_quoted(setup.model_path)}")
    return settings


def cells(setup: Setup, round_: Round) -> list[Cell]:
    """Compose the configuration of every trial of a round."""
    register_resolvers()
    composer = Composer(_load)
    shared = [*overrides(setup, round_.rows, round_.batch_size), "tracking=none"]
    return [composer([*shared, *_adapter(adapter)]) for adapter in round_.grid.adapters()]


def _adapter(adapter: Adapter) -> list[str]:
    return [
        f"lora.r={adapter.r}",
        f"lora.targets={adapter.targets}",
        f"train.lr={adapter.lr}",
        f"seed={adapter.seed}",
    ]


def _load(choices: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", overrides=choices)


def _data_overrides(path: Path) -> list[str]:
    if not path.is_file():
        raise BenchmarkError(f"--data must name a file of rows, got {path}; name another")
    present = set(_first(path))
    for columns in _COLUMNS:
        names = {name for name in columns.values() if name not in ("null", "input")}
        if names <= present:
            typed = [f"data.columns.{kind}={name}" for kind, name in columns.items()]
            return ["data=file", f"data.path={_quoted(str(path.resolve()))}", *typed]
    raise BenchmarkError(
        "--data must hold the columns instruction and output, prompt and response, or messages, "
        f"got {', '.join(sorted(present))}; rename the columns of {path.name}"
    )


def _first(path: Path) -> dict[str, Any]:
    rows = read_file(path)
    if not rows:
        raise BenchmarkError(f"--data must name a file with rows, got the empty {path}")
    return rows[0]


def _quoted(text: str) -> str:
    """Quote a value for Hydra, because it may contain spaces, commas and equal signs."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
