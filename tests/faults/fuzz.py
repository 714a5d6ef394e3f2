"""Malformed commands, data files and adapters: each is used, or refused with a sentence.

A valid one is changed at random places: bytes and words are changed, doubled, cut or swapped.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests import grid
from tests.faults.damage import deadline
from tests.faults.fault import Count, Draw, FaultClass
from tinyllama_lab.core.models.saved import check_adapter_folder
from tinyllama_lab.data.rows import to_rows
from tinyllama_lab.data.sources import load_rows
from tinyllama_lab.errors import LabError
from tinyllama_lab.sweep.check import check_command
from tinyllama_lab.sweep.settings.typed_paths import quote_paths

COMMANDS, DATA, ADAPTERS = 600, 7400, 2000  # a command takes as long as a hundred adapters
WORDS = (
    *("lora.r=8,16", "data.n=1500,3000", "train.lr=1e-3", "study=mine", "quant=nf4", "seeds=2"),
    *("lora.targets=[q_proj,v_proj]", "data=file", "data.path=rows.jsonl", "model=tiny_random"),
    *("lora.rank_pattern={down_proj: 16}", "hydra/launcher=inline", "retry=all", "confirm=off"),
    *(
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "tune=train.lr",
        "data.columns.prompt=q",
    ),
    *("train.lr=interval(1e-5,1e-3)", "lora.r=range(4,32,4)", "sweeps_dir=elsewhere", "--cfg=job"),
    *("lora.layers=last_2", "+model.x=1", "~lora", "eval.harness=[arc_easy]", "seed=${seeds}"),
)
ODD = (
    "\x00",
    "\n",
    "\u202e",
    "${oc.env:HOME}",
    "../..",
    "'",
    '"',
    "{",
    "[",
    "=",
    ",",
    "é",
    "\ud800",
)
ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}.", "intent": "n"} for n in range(30)]


def mutated(content: bytes, dice: random.Random) -> bytes:
    """Return the content with one to three changes."""
    for _ in range(dice.randint(1, 3)):
        at, end = sorted(dice.randrange(len(content) + 1) for _ in range(2))
        piece = content[at:end][:200]
        odd = dice.choice(ODD).encode("utf-8", "surrogatepass")
        content = dice.choice(
            [
                content[:at] + odd + content[at:],
                content[:at] + content[at + len(piece) :],
                content[:at] + piece + piece + content[at:],
                content[:at] + bytes([dice.randrange(256)]) + content[at + 1 :],
                content[:at],
                content[at:] + content[:at],
            ]
        )
        content = content or b"{"
    return content


# ---- commands -----------------------------------------------------------------------------------


def command(dice: random.Random) -> list[str]:
    """Return a command line with a few words, of which some are malformed."""
    words = dice.sample(WORDS, dice.randint(1, 4))
    at = dice.randrange(len(words))
    changed = mutated(words[at].encode(), dice).decode("utf-8", "surrogateescape")
    return ["-m"] * dice.randint(0, 1) + [*words[:at], changed, *words[at + 1 :]]


def try_command(dice: random.Random, folder: Path) -> None:
    check_command(quote_paths(command(dice)))


# ---- data ---------------------------------------------------------------------------------------


def _csv(separator: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


_SIDES = {"user": "prompt", "assistant": "response"}
_CHATS = [
    {"messages": [{"role": role, "content": row[side]} for role, side in _SIDES.items()]}
    for row in ROWS
]
FILES = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "chats.jsonl": "".join(json.dumps(row) + "\n" for row in _CHATS).encode(),
    "rows.json": json.dumps(ROWS).encode(),
    "rows.csv": _csv(","),
    "rows.tsv": _csv("\t"),
}


def try_data(dice: random.Random, folder: Path) -> None:
    name = dice.choice(list(FILES))
    path = folder / name
    path.write_bytes(mutated(FILES[name], dice))
    data = replace(_data(), path=str(path))
    to_rows(load_rows(data), data)


def _data() -> Any:
    if not _DATA:
        typed = ("data=file", f"data.path={Path(grid.__file__).with_name('fuzz-rows.jsonl')}")
        _DATA.append(grid.config.load(grid.cells(*typed)[0].raw).data)
    return _DATA[0]


_DATA: list[Any] = []


# ---- adapters -----------------------------------------------------------------------------------

_SETTINGS = json.dumps(
    {
        **{"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj"]},
        **{"task_type": "CAUSAL_LM", "rank_pattern": {"down_proj": 8}, "bias": "none"},
    }
).encode()
_WEIGHTS = save({"base_model.model.q_proj.lora_A.weight": torch.ones(4, 8)})


def try_adapter(dice: random.Random, folder: Path) -> None:
    of_settings = dice.random() < 0.5
    settings = mutated(_SETTINGS, dice) if of_settings else _SETTINGS
    weights = _WEIGHTS if of_settings else mutated(_WEIGHTS, dice)
    (folder / "adapter_config.json").write_bytes(settings)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    check_adapter_folder(folder)


def fuzz(draw: Draw) -> Count:
    """Try malformed ones of each kind, and look for what they left outside their folder."""
    count, work = Count(), draw.folder / "work"
    work.mkdir()
    kinds: list[tuple[str, int, Callable[[random.Random, Path], None]]] = [
        ("commands", COMMANDS, try_command),
        ("data files", DATA, try_data),
        ("adapters", ADAPTERS, try_adapter),
    ]
    before = set(draw.folder.iterdir())
    here = Path.cwd()
    os.chdir(work)
    try:
        for kind, full, attempt in kinds:
            for _ in range(draw.times(full)):
                _judge(count, kind, attempt, random.Random(draw.dice.randrange(2**31)), work)
    finally:
        os.chdir(here)
    if left := set(draw.folder.iterdir()) - before:
        count.wrong.append(f"files outside: {left}")
    return count


def _judge(
    count: Count,
    kind: str,
    attempt: Callable[[random.Random, Path], None],
    dice: random.Random,
    work: Path,
) -> None:
    state = dice.getstate()
    try:
        with deadline(), contextlib.redirect_stderr(io.StringIO()):
            attempt(dice, work)
    except LabError as error:
        if len(str(error)) > 6000:
            count.fail(f"{kind}: a message of {len(str(error))} characters")
        else:
            count.add(f"{kind} refused")
    except SystemExit as end:  # of a flag that Hydra's parser refuses
        count.add(f"{kind} refused") if end.code == 2 else count.fail(f"{kind}: exit {end.code}")
    except Exception as error:
        dice.setstate(state)
        what = command(dice) if kind == "commands" else dice.random()
        count.fail(f"{kind}: {what}: {type(error).__name__}: {str(error)[:200]}")
    else:
        count.add(f"{kind} that are still valid")


FUZZ = FaultClass("fuzz", "malformed commands, data files and adapters", fuzz)
