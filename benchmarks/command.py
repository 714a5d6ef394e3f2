"""The command that runs a round here, and the configurations it composes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.job import Adapter, BenchmarkError, Round, Setup
from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.data.sources import read_file
from tinyllama_lab.sweep.settings.compose import Cell, Composer, register_resolvers

_COLUMNS = (  # how public sets call the prompt, the context and the response
    {"prompt": "instruction", "context": "input", "response": "output"},
    {"prompt": "prompt", "response": "response"},
    {"messages": "messages", "prompt": "null", "response": "null"},
)


def overrides(setup: Setup, rows: int, batch_size: int) -> list[str]:
    """What every trial of a round has in common, as one types it."""
    texts = [
        f"model={setup.model}",
        *(_data_overrides(Path(setup.data)) if setup.data else ["data=travel"]),
        f"data.n={rows}",
        f"data.eval_n={setup.eval_rows}",
        f"quant={setup.quant}",
        "lora.alpha=null",  # 2 r, as of the peers
        f"train.batch_size={batch_size}",
        "train.epochs=1",
        "eval.generations=0",
        "eval.latency_tokens=0",
        "confirm=off",  # no trials beside the grid, which is what the peers train
        f"hardware.device={setup.device}",
    ]
    if setup.model_path:
        texts.append(f"model.path={_quoted(setup.model_path)}")
    return texts


def cells(setup: Setup, round_: Round) -> list[Cell]:
    """The composed configuration of every trial of a round."""
    register_resolvers()
    composer = Composer(_load)
    shared = [*overrides(setup, round_.rows, round_.batch_size), "tracking=none"]
    return [composer([*shared, *_adapter(each)]) for each in round_.grid.adapters()]


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
    found = set(_first(path))
    for columns in _COLUMNS:
        names = {name for name in columns.values() if name not in ("null", "input")}
        if names <= found:
            named = [f"data.columns.{kind}={name}" for kind, name in columns.items()]
            return ["data=file", f"data.path={_quoted(str(path.resolve()))}", *named]
    raise BenchmarkError(
        "--data must hold the columns instruction and output, prompt and response, or messages, "
        f"got {', '.join(sorted(found))}; rename the columns of {path.name}"
    )


def _first(path: Path) -> dict[str, Any]:
    rows = read_file(path)
    if not rows:
        raise BenchmarkError(f"--data must name a file with rows, got the empty {path}")
    return rows[0]


def _quoted(text: str) -> str:
    """A value that may hold spaces, commas and equal signs, as Hydra reads it."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
