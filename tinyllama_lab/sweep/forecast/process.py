"""The process that forecasts packs: the driver half never imports torch.

It is started first, so that its imports run while the driver checks the command.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinyllama_lab.errors import LabError, ModelError
from tinyllama_lab.sweep.launchers.local import worker_environment
from tinyllama_lab.sweep.plan import Planned

_MODULE = "tinyllama_lab.core.forecast"
_LINES = 5  # of its output in an error


@dataclass(frozen=True)
class Estimate:
    """Tokens of a row, where no tokenizer can count them; None where nothing is known."""

    mean: float | None = None
    longest: float | None = None
    rows: float | None = None
    source: str = ""


class Forecasting:
    """A process that waits for a request."""

    def __init__(self) -> None:
        """Start it."""
        pipe = subprocess.PIPE
        self._talking = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            encoding="utf-8",
            env=worker_environment(),
        )

    def __enter__(self) -> Forecasting:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, also if it was asked nothing, or if another thread still waits."""
        self._process.kill()  # which ends the wait of that thread
        with self._talking:
            self._process.communicate()

    def ask(
        self,
        packs: Sequence[Sequence[Planned]],
        hardware: Mapping[str, Any],
        estimates: Mapping[str, Estimate],
    ) -> dict[str, Any]:
        """Return what packs need; see `tinyllama_lab.core.forecast.answer`.

        Args:
            packs: the trials of each.
            hardware: the settings of the group `hardware`.
            estimates: tokens of rows, by key of the trial.

        Raises:
            LabError: a base or its rows cannot be used, or the process failed.
        """
        request = {
            "hardware": hardware,
            "packs": [
                [
                    {
                        "key": planned.trial.key,
                        "science": planned.config,
                        "estimate": asdict(estimates[planned.trial.key]),
                    }
                    for planned in pack
                ]
                for pack in packs
            ],
        }
        with self._talking:
            printed, errors = self._process.communicate(json.dumps(request))
        if self._process.returncode or not printed:
            tail = " | ".join(errors.strip().splitlines()[-_LINES:])
            raise LabError(f"the forecast could not be computed: {tail}")
        reply: dict[str, Any] = json.loads(printed)
        if problems := reply.get("problems"):
            raise ModelError(*problems)
        return reply
