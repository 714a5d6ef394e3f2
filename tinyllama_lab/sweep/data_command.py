"""`python -m tinyllama_lab data ...`: what a command would train on, without training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study.study import Study
from tinyllama_lab.sweep.check import check_command, composed, single_values
from tinyllama_lab.sweep.launchers.local import worker_environment
from tinyllama_lab.sweep.plan import DATA_SETTINGS, check_cells
from tinyllama_lab.sweep.settings.day import dated

MULTIRUN = ("-m", "--multirun")
USAGE = "python -m tinyllama_lab data data=file data.path=my.jsonl"


def show_data(arguments: Sequence[str]) -> int:
    """Show every data set of a command as its tokenizer sees it; returns the exit status.

    A sweep over settings of the model or the data shows one after another; other sweeps change
    nothing here.

    Raises:
        LabError: a mistake of the user's, or data that cannot be read.
    """
    typed = [text for text in arguments if text not in MULTIRUN]
    if options := [text for text in typed if text.startswith("-")]:
        raise ConfigError([f"data takes settings alone, got {options[0]}; type {USAGE}"])
    check_command(["-m", *typed])
    values = single_values(typed)
    choices = [
        texts
        for key, texts in values.items()
        if len(texts) == 1 or (texts and key.startswith(DATA_SETTINGS))
    ]
    for key in (key for key, texts in values.items() if not texts and key.startswith("data")):
        print(f"note: {key} is searched over an interval; the data is shown with its default")
    configs = check_cells([composed(each) for each in product(*choices)], enough=False)
    first = configs[0]
    asked = [
        {
            "model": asdict(each.model),
            "data": {**asdict(each.data), "rendering": None},  # its columns are still looked for
            "eval": asdict(each.eval),
            "seed": each.seed,
        }
        for each in dated(configs, Study(Path(first.sweeps_dir), first.study))
    ]
    different = list(dict.fromkeys(json.dumps(each, sort_keys=True) for each in asked))
    sys.stdout.flush()
    worker = [sys.executable, "-m", "tinyllama_lab.core.data_report"]
    text = f"[{','.join(different)}]"
    environment = {**worker_environment(), "TQDM_DISABLE": "1"}  # bars of what is made once
    done = subprocess.run(worker, input=text, text=True, env=environment, check=False)
    return done.returncode
