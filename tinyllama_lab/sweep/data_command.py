"""`python -m tinyllama_lab data ...`: shows what a command would train on, without training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from tinyllama_lab.config.schema import Config
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.check import check_command, composed, single_values
from tinyllama_lab.sweep.launchers.local import worker_environment
from tinyllama_lab.sweep.plan import DATA_SETTINGS, check_cells
from tinyllama_lab.sweep.settings.day import dated
from tinyllama_lab.sweep.settings.flags import settings_only

USAGE = "python -m tinyllama_lab data data=file data.path=my.jsonl"
HELP = f"""\
{USAGE}

Shows what a sweep with these settings would train on, and trains nothing: how the rows are read
and divided, an example as the model gets it, and what is left out. Takes the settings of a sweep,
lists included."""


def show_data(arguments: Sequence[str]) -> int:
    """Show every data set of a command as its tokenizer sees it, and return the exit status.

    Every combination of the swept settings of model and data is shown once. Other swept settings
    do not change the data.

    Raises:
        LabError: the command is wrong, or the data cannot be read.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP)
        return 0
    typed = settings_only("data", arguments, USAGE)
    # with -m, because this command always takes lists
    check_command(["-m", *typed])
    values = single_values(typed)
    # other swept settings do not change the data, so their default is used
    choices = [
        texts
        for key, texts in values.items()
        if len(texts) == 1 or (texts and key.startswith(DATA_SETTINGS))
    ]
    for key in (key for key, texts in values.items() if not texts and key.startswith("data")):
        print(f"note: {key} is searched over an interval; the data is shown with its default")
    configs = check_cells([composed(overrides) for overrides in product(*choices)], enough=False)
    first = configs[0]
    requests = map(_request, dated(configs, StudyFolder(Path(first.sweeps_dir), first.study)))
    # each distinct data set once
    different = list(dict.fromkeys(json.dumps(request, sort_keys=True) for request in requests))
    sys.stdout.flush()  # the worker writes to the same terminal or pipe
    worker = [sys.executable, "-m", "tinyllama_lab.core.data_report"]
    text = f"[{','.join(different)}]"
    environment = {**worker_environment(), "TQDM_DISABLE": "1"}  # no progress bars of downloads
    done = subprocess.run(worker, input=text, text=True, env=environment, check=False)
    return done.returncode


def _request(settings: Config) -> dict[str, Any]:
    """Return the part of a configuration that the process that reads the data needs."""
    return {
        "model": asdict(settings.model),
        # without `rendering`, the process recognises the columns itself
        "data": {**asdict(settings.data), "rendering": None},
        "eval": asdict(settings.eval),
        "seed": settings.seed,
    }
