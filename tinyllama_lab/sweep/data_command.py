"""`python -m tinyllama_lab data ...`: what a command would train on, without training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

from tinyllama_lab.study import Study
from tinyllama_lab.sweep.check import check_command, composed, single_values
from tinyllama_lab.sweep.day import dated
from tinyllama_lab.sweep.plan import DATA_SETTINGS, check_cells
from tinyllama_lab.sweep.workers.local import worker_environment

MULTIRUN = ("-m", "--multirun")


def show_data(arguments: Sequence[str]) -> int:
    """Show every data set of a command as its tokenizer sees it; returns the exit status.

    A sweep over settings of the model or the data shows one after another; other sweeps change
    nothing here.

    Raises:
        LabError: a mistake of the user's, or data that cannot be read.
    """
    typed = [text for text in arguments if text not in MULTIRUN]
    check_command(["-m", *typed])
    choices = [
        texts
        for key, texts in single_values(typed).items()
        if len(texts) == 1 or (texts and key.startswith(DATA_SETTINGS))
    ]
    configs = check_cells([composed(each) for each in product(*choices)], enough=False)
    first = configs[0]
    asked = [
        {"model": asdict(each.model), "data": asdict(each.data)}
        for each in dated(configs, Study(Path(first.sweeps_dir), first.study))
    ]
    different = list(dict.fromkeys(json.dumps(each, sort_keys=True) for each in asked))
    sys.stdout.flush()
    worker = [sys.executable, "-m", "tinyllama_lab.core.data_report"]
    text = f"[{','.join(different)}]"
    done = subprocess.run(worker, input=text, text=True, env=worker_environment(), check=False)
    return done.returncode
