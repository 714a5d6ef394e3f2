"""The process that forecasts packs and tries PyTorch: the driver half never imports torch.

It is started first, so that its imports run while the driver checks the command. It writes its
answers as lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinyllama_lab.errors import LabError, ModelError
from tinyllama_lab.sweep.launchers.local import worker_environment
from tinyllama_lab.sweep.plan import Planned

_MODULE, _PROBE = "tinyllama_lab.core.forecast", "probe"
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

    def __init__(self, probes: bool = False) -> None:
        """Start it.

        Args:
            probes: whether it tries PyTorch first; see `probe`.
        """
        self._probe: dict[str, Any] | str | None = None
        self._probes = probes
        self._talking = threading.RLock()
        # a file, because nobody reads what libraries print before the process ends
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, *([_PROBE] if probes else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env=worker_environment(),
        )

    def __enter__(self) -> Forecasting:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, also if it was asked nothing, or if another thread still waits."""
        self._process.kill()  # which ends the wait of that thread
        with self._talking, self._errors, self._process:
            pass

    def probe(self) -> dict[str, Any] | str:
        """Return what PyTorch can do here, or why it does not start.

        See `tinyllama_lab.core.probe`.
        """
        with self._talking:
            if self._probe is None:
                line = self._line()
                self._probe = json.loads(line) if line else self._last_words(1)
            return self._probe

    def _line(self) -> str:
        """Return the next line; empty if the process has ended before its end."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return line if line.endswith("\n") else ""

    def _last_words(self, lines: int) -> str:
        """Return the end of what an ended process printed."""
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        return " | ".join(said[-lines:]) or f"exit status {status}"

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
            if self._probes:
                self.probe()  # its line comes first
            line = self._answer(json.dumps(request))
            if not line:
                raise LabError(f"the forecast could not be computed: {self._last_words(_LINES)}")
        reply: dict[str, Any] = json.loads(line)
        if problems := reply.get("problems"):
            raise ModelError(*problems)
        return reply

    def _answer(self, request: str) -> str:
        """Send the request, and return the line that answers it; empty if the process ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(request)
        return self._line()
