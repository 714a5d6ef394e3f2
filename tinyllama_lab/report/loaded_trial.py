"""A trial in Python: its settings, metrics and files as data frames, and its adapter.

This `Trial` is what `import tinyllama_lab` offers. It reads a `TrialFolder`, the on-disk contract,
and never writes to it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_lab.config.axes import words
from tinyllama_lab.errors import StudyError
from tinyllama_lab.metrics import HELDOUT_LOSS
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.study.events import read_events

if TYPE_CHECKING:
    import pandas as pd
    import peft
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class Trial:
    """A trial of a loaded study: its configuration, its result and its files.

    A base is a `Trial` as well: the model before any training, with its own evaluation.
    """

    row: TrialRow

    @property
    def folder(self) -> Path:
        """The trial folder, which holds every file of the trial."""
        return self.row.trial.folder

    @property
    def name(self) -> str:
        """The readable half of the folder's name."""
        return self.row.trial.name

    @property
    def key(self) -> str:
        """The hash of everything that can change the adapter."""
        return self.row.trial.key

    @property
    def state(self) -> str:
        """`done`, `pruned`, `diverged`, `oom` or `failed`; `missing` without a result."""
        return str(self.row.result.state) if self.row.result else "missing"

    @property
    def error(self) -> str | None:
        """The message of a trial that did not end well."""
        return (self.row.result.error or {}).get("message") if self.row.result else None

    @property
    def swept(self) -> dict[str, Any]:
        """The values of the swept keys, by key: `{"lora.r": 8, "seed": 0}`."""
        return dict(self.row.swept)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration: `trial.config["lora"]["r"]`.

        Raises:
            StudyError: the file is damaged.
        """
        return self.row.trial.read_config()

    @property
    def metrics(self) -> dict[str, float]:
        """Every metric of the result by its name, such as `eval/loss`; empty without a result."""
        return dict(self.row.result.metrics) if self.row.result else {}

    def history(self) -> pd.DataFrame:
        """Return a data frame with one row for each logged optimizer step, in order.

        Columns are `step`, `time` (UTC), `tokens` (trained on so far), `tokens_per_s`, and the
        metrics: `train/loss`, `train/grad_norm` and `train/lr`, and `heldout/loss` where it was
        taken. A step that was repeated after a crash has one row, that of the repetition. The
        frame of a base is empty.
        """
        import pandas as pd

        steps: dict[int, dict[str, Any]] = {}
        for event in read_events(self.row.trial.events_file):
            if event["kind"] == "metric":
                facts = {name: event.get(name) for name in ("tokens", "tokens_per_s")}
                time = pd.Timestamp(event["time"], unit="s", tz="UTC")
                steps[event["step"]] = {"time": time, **facts, **event["values"]}
            elif event["kind"] == "heldout":
                steps[event["step"]] |= event["values"]
        return pd.DataFrame([{"step": step, **steps[step]} for step in sorted(steps)])

    def per_example(self) -> pd.DataFrame:
        """Return a data frame with one row for each held-out example.

        Columns are `example`, `loss` (nats, summed over the supervised tokens), `tokens` (their
        number), and where they were recorded `cluster` and `bytes`.

        Raises:
            StudyError: the file is damaged.
        """
        return _read_frame(self.row.evaluations.per_example_file)

    def generations(self) -> pd.DataFrame:
        """Return a data frame with one row for each held-out prompt that the model completed.

        Columns are `prompt`, `reference`, `output`, `intent`, `sampled` and one for each score.

        Raises:
            StudyError: the file is damaged.
        """
        return _read_frame(self.row.evaluations.generations_file)

    def load_adapter(self, device: str = "auto") -> peft.PeftModel:
        """Load the base with the trained adapter on it, for inference.

        The base is loaded with the quantization and precision that the trial was trained with.

        Args:
            device: `cpu`, `cuda`, or `auto` for the GPU where there is one.

        Raises:
            StudyError: the trial has no adapter.
            ModelError: the base cannot be loaded, or the device is not available here.
        """
        adapted: peft.PeftModel = _loader().load_adapter(self.row.trial, device)
        return adapted

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the base.

        Raises:
            ModelError: the tokenizer cannot be loaded here.
        """
        tokenizer: PreTrainedTokenizerBase = _loader().load_tokenizer(self.row.trial)
        return tokenizer

    def __repr__(self) -> str:
        """`Trial(r=8 seed=0, done, eval/loss 2.364)`."""
        values, loss = words(self.row.swept), self.metrics.get(HELDOUT_LOSS)
        label = f"base {values}".strip() if self.row.is_base else values or self.name
        loss_part = "" if loss is None else f", {HELDOUT_LOSS} {loss:.3f}"
        return f"Trial({label}, {self.state}{loss_part})"


def _loader() -> Any:
    """Import the module that loads models, at the first call: a report must not import torch."""
    return import_module("tinyllama_lab.core.models.trained")


def _read_frame(path: Path) -> pd.DataFrame:
    """Read a file of JSON lines, nested fields as `outer/inner`; empty where there is no file.

    Raises:
        StudyError: a line is not JSON.
    """
    import pandas as pd

    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return pd.DataFrame()
    try:
        records = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise StudyError(
            f"{path} must hold one JSON record a line, got a damaged file ({error}); delete the "
            "trial's folder and run its command again"
        ) from error
    return pd.json_normalize(records, sep="/")
