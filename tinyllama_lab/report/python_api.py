"""A study in Python: its trials as objects and data frames, its verdicts and recommendation.

`Study` and `Trial` are what `import tinyllama_lab` offers. They read the folders of the on-disk
contract, `tinyllama_lab.study`, and never write to them. Every number is the report's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_lab.config.axes import spelled, words
from tinyllama_lab.config.command import SWEEPS_DIR
from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.report.table import Row, read_confirmation, read_study
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.files import user_path
from tinyllama_lab.study.study import Study as StudyFolder

if TYPE_CHECKING:
    import pandas as pd
    import peft
    from transformers import PreTrainedTokenizerBase

    from tinyllama_lab.report.analysis.comparable import Comparable
    from tinyllama_lab.report.analysis.settings import Settings


@dataclass(frozen=True, repr=False)
class Trial:
    """A trial of a loaded study: what it was set to, and what came of it.

    A base is one as well: the model before any training, with its own evaluation.
    """

    row: Row

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
        """One row for each optimizer step that was logged, in order.

        Columns are `step`, `time` (UTC), `tokens` (trained on so far), `tokens_per_s`, and the
        metrics: `train/loss`, `train/grad_norm` and `train/lr`. A step that was repeated after a
        crash counts once, as it was repeated. A base has no steps.
        """
        import pandas as pd

        steps: dict[int, dict[str, Any]] = {}
        for event in read_events(self.row.trial.events_file):
            if event["kind"] == "metric":
                facts = {name: event.get(name) for name in ("tokens", "tokens_per_s")}
                time = pd.Timestamp(event["time"], unit="s", tz="UTC")
                steps[event["step"]] = {"time": time, **facts, **event["values"]}
        return pd.DataFrame([{"step": step, **steps[step]} for step in sorted(steps)])

    def per_example(self) -> pd.DataFrame:
        """One row for each held-out example.

        Columns are `example`, `loss` (nats, summed over the supervised tokens), `tokens` (their
        number), and where they were recorded `cluster` and `bytes`.

        Raises:
            StudyError: the file is damaged.
        """
        return _read_frame(self.row.scores.per_example_file)

    def generations(self) -> pd.DataFrame:
        """One row for each held-out prompt that the model answered.

        Columns are `prompt`, `reference`, `output`, `intent`, `sampled` and one for each score.

        Raises:
            StudyError: the file is damaged.
        """
        return _read_frame(self.row.scores.generations_file)

    def load_adapter(self, device: str = "auto") -> peft.PeftModel:
        """The base with the trained adapter on it, for inference.

        The base is loaded with the quantization and precision that the trial was trained with.

        Args:
            device: `cpu`, `cuda`, or `auto` for the GPU where there is one.

        Raises:
            StudyError: the trial has no adapter.
            ModelError: the base or the device cannot be had here.
        """
        adapted: peft.PeftModel = _loader().load_adapter(self.row.trial, device)
        return adapted

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the base.

        Raises:
            ModelError: it cannot be had here.
        """
        tokenizer: PreTrainedTokenizerBase = _loader().load_tokenizer(self.row.trial)
        return tokenizer

    def __repr__(self) -> str:
        """`Trial(r=8 seed=0, done, eval/loss 2.364)`."""
        values, loss = words(self.row.swept), self.metrics.get("eval/loss")
        label = f"base {values}".strip() if self.row.is_base else values or self.name
        score = "" if loss is None else f", eval/loss {loss:.3f}"
        return f"Trial({label}, {self.state}{score})"


@dataclass(frozen=True)
class Verdict:
    """What a step from one value of a swept key to the next does to the held-out loss."""

    key: str  # such as lora.r
    first: Any
    second: Any
    verdict: str  # `better`: the loss of `second` is lower
    difference: float  # of the losses, `second` minus `first`, in `unit`
    low: float  # the ends of the 95 % interval of the difference
    high: float
    unit: str
    p: float  # that there is no difference, corrected for the number of verdicts
    seeds: int
    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Recommendation:
    """The setting to take, as the report recommends it."""

    settings: dict[str, Any]  # by swept key, without the seed; empty where nothing is recommended
    loss: float | None  # mean over seeds, in `unit`
    unit: str
    trials: tuple[Trial, ...]  # with these settings, the lowest loss first
    sentences: tuple[str, ...]  # what to take, why, and how sure that is

    def __str__(self) -> str:
        return "\n".join(self.sentences)


class Study:
    """A study as it was when it was loaded.

    Attributes:
        name: of the study.
        folder: of the study, below `sweeps_dir`.
        report_file: the HTML page, which a sweep writes at its end.
        trials: every trial but those that confirm the recommendation, as the table orders them.
        bases: the models before any training, one for each that trials are compared with.
        confirmation_trials: fresh seeds, scored on rows that no choice has seen.
    """

    def __init__(self, folder: StudyFolder) -> None:
        """Read a study's folder; see `load_study`."""
        rows = read_study(folder)
        self._study, self._rows = folder, rows
        self._confirmation = read_confirmation(folder)
        self.name, self.folder = folder.name, folder.folder
        self.report_file = folder.report_file
        self.trials = [Trial(row) for row in rows if not row.is_base]
        self.bases = [Trial(row) for row in rows if row.is_base]
        self.confirmation_trials = [Trial(row) for row in self._confirmation]

    def to_frame(self) -> pd.DataFrame:
        """One row for each of `trials`.

        Columns are `trial` (its name), `key`, `state`, `compared` (whether the verdicts rest on
        it), `best`, the swept keys, every metric and `error`. `compared` is false for trials
        that are not done, were scored on other rows, or lost against another value of a tuned
        setting. A list, such as module names, is one string: `q_proj+v_proj`.
        """
        import pandas as pd

        compared = {scored.row.trial for scored in self._comparable.trials}
        records = [
            {
                "trial": trial.name,
                "key": trial.key,
                "state": trial.state,
                "compared": trial.row.trial in compared,
                "best": trial.row.is_best,
                **{key: _cell(value) for key, value in trial.swept.items()},
            }
            for trial in self.trials
        ]
        metrics = pd.DataFrame([trial.metrics for trial in self.trials])
        frame = pd.DataFrame(records).join(metrics[sorted(metrics)])
        return frame.assign(error=[trial.error for trial in self.trials])

    def best(self) -> Trial | None:
        """The trial with the lowest held-out loss; None where trials cannot be compared.

        The lowest loss is partly luck: `recommendation` says which setting to take.
        """
        return next((trial for trial in self.trials if trial.row.is_best), None)

    def base(self) -> Trial:
        """The model before any training, scored on the same rows.

        Raises:
            StudyError: the trials have several bases, of which `bases` holds all.
        """
        if len(self.bases) != 1:
            raise StudyError(
                f"base() needs a study with one base, got {len(self.bases)} in {self.name}; "
                "take one of study.bases"
            )
        return self.bases[0]

    def verdicts(
        self,
        *,
        margin: float | None = None,
        correction: str | None = None,
        pairs: str | None = None,
    ) -> list[Verdict]:
        """What each swept key does, as the report says it; empty without two values to compare.

        Args:
            margin: differences within it count as none, in nats per token; 0.02 by default.
            correction: of p-values for several verdicts: `holm` (default) or `fdr_bh`.
            pairs: of three or more numbers: `neighbours` (default) or `all`.

        Raises:
            ConfigError: an argument is out of its bounds.
        """
        from tinyllama_lab.report.analysis.analysis import analyse
        from tinyllama_lab.report.answers import answers

        settings = _settings(margin=margin, correction=correction, pairs=pairs)
        found = self._comparable
        analysis = analyse(found, settings)
        sentences = answers(found, analysis.effects, analysis.cells, settings.margin)
        return [
            Verdict(
                key=effect.key,
                first=effect.first,
                second=effect.second,
                verdict=effect.verdict,
                difference=effect.estimate.difference,
                low=effect.estimate.interval()[0],
                high=effect.estimate.interval()[1],
                unit=effect.measure.unit,
                p=effect.p,
                seeds=effect.seeds,
                sentence=sentence,
            )
            for effect, sentence in zip(analysis.effects, sentences, strict=True)
        ]

    def recommendation(
        self, *, margin: float | None = None, cost: str | None = None
    ) -> Recommendation:
        """The cheapest of the settings that cannot be told apart from the best.

        Args:
            margin: differences within it count as none, in nats per token; 0.02 by default.
            cost: what to save: `compute` (default), `memory`, `size`, `time` or `decode`.

        Raises:
            ConfigError: an argument is out of its bounds.
        """
        from tinyllama_lab.report.analysis.analysis import analyse
        from tinyllama_lab.report.analysis.confirmed import recommendation
        from tinyllama_lab.report.analysis.tuned import setting_words
        from tinyllama_lab.report.caveats import not_compared
        from tinyllama_lab.report.page.search import read_search

        settings, found = _settings(margin=margin, cost=cost), self._comparable
        cells = analyse(found, settings).cells
        search = read_search(self._study)
        if search and search.has_own_goals:  # what is best is decided by the goals of the search
            cells = [replace(cell, is_chosen=False) for cell in cells]
        cells, sentences = recommendation(found, cells, self._confirmation, settings)
        unit = found.measure.unit
        chosen = next((cell for cell in cells if cell.is_chosen), None)
        if chosen is None:
            said = sentences if found.trials else not_compared(found)
            return Recommendation({}, None, unit, (), tuple(said))
        scored = sorted(chosen.trials, key=lambda trial: trial.loss)
        return Recommendation(
            settings=setting_words([trial.row for trial in scored]),
            loss=chosen.loss,
            unit=unit,
            trials=tuple(Trial(trial.row) for trial in scored),
            sentences=tuple(sentences),
        )

    @cached_property
    def _comparable(self) -> Comparable:
        from tinyllama_lab.report.analysis.comparable import comparable  # late: scipy takes long

        return comparable(self._rows)

    def __len__(self) -> int:
        return len(self.trials)

    def __repr__(self) -> str:
        """`Study(quickstart: 18 trials, 18 done)`."""
        done = sum(trial.state == "done" for trial in self.trials)
        return f"Study({self.name}: {len(self)} trials, {done} done)"


def load_study(name: str = "default", sweeps_dir: str | Path = SWEEPS_DIR) -> Study:
    """Read a study from its folder.

    Args:
        name: of the study, as in `study=<name>`.
        sweeps_dir: the folder that holds the studies.

    Raises:
        StudyError: there is no such study, or a file of it is damaged.
    """
    folder = StudyFolder(user_path(str(sweeps_dir)).absolute(), name)
    study = Study(folder)
    if not study.trials:
        there = sorted(p.parent.name for p in folder.root.glob("*/trials")) or ["none yet"]
        raise StudyError(f"{folder.folder} holds no trials; studies here: {', '.join(there)}")
    return study


def _loader() -> Any:
    """What loads models; by name, for a report never imports torch until it is asked to."""
    return import_module("tinyllama_lab.core.models.trained")


def _settings(**given: Any) -> Settings:
    """How trials are judged: the report's defaults where nothing is given."""
    from tinyllama_lab.report.analysis.settings import Settings

    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    if problems := settings.problems():
        raise ConfigError(problems)
    return settings


def _cell(value: Any) -> Any:
    """A value that can be grouped by."""
    return spelled(value) if isinstance(value, list) else value


def _read_frame(path: Path) -> pd.DataFrame:
    """A file of JSON lines, fields of fields by `outer/inner`; empty where there is no file."""
    import pandas as pd

    try:
        lines: Sequence[str] = path.read_text(encoding="utf-8").split("\n")
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
