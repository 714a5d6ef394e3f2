"""A study in Python: its trials in a data frame, its verdicts and its recommendation.

This `Study` is what `import tinyllama_lab` offers. It reads a `StudyFolder`, the on-disk contract,
and never writes to it. Every number is the report's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_lab.config.axes import spelled
from tinyllama_lab.config.command import STUDY, SWEEPS_DIR
from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.loaded_trial import Trial
from tinyllama_lab.study.files import user_path
from tinyllama_lab.study.study import StudyFolder

if TYPE_CHECKING:
    import pandas as pd

    from tinyllama_lab.report.analysis.analysis import Analysis
    from tinyllama_lab.report.analysis.settings import Settings


@dataclass(frozen=True)
class Verdict:
    """What a step from one value of a swept key to another does to the held-out loss."""

    key: str  # such as lora.r
    first: Any
    second: Any
    verdict: str  # `better`: the loss of `second` is lower
    difference: float  # of the losses, `second` minus `first`, in `unit`
    low: float  # the ends of the 95 % interval of the difference
    high: float
    unit: str
    p: float  # p-value of no difference, corrected for the number of verdicts
    seeds: int
    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Recommendation:
    """The setting that the report recommends."""

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
        self._analyses: dict[Settings, Analysis] = {}  # each is computed once
        self.name, self.folder = folder.name, folder.folder
        self.report_file = folder.report_file
        self.trials = [Trial(row) for row in rows.trials if not row.is_base]
        self.bases = [Trial(row) for row in rows.trials if row.is_base]
        self.confirmation_trials = [Trial(row) for row in rows.confirmation]

    def to_frame(self) -> pd.DataFrame:
        """Return a data frame with one row for each of `trials`.

        Columns are `trial` (its name), `key`, `state`, `compared` (whether the verdicts rest on
        it), `best`, the swept keys, every metric and `error`. `compared` is false for trials
        that are not done, were scored on other rows, or lost against another value of a tuned
        setting. A list, such as module names, is one string: `q_proj+v_proj`.
        """
        import pandas as pd  # imported late, so that `import tinyllama_lab` stays fast

        compared = {scored.row.trial for scored in self._analysis(_settings()).comparison.trials}
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
        """Return the trial with the lowest held-out loss; None where trials cannot be compared.

        The lowest loss is partly luck: `recommendation` says which setting to take.
        """
        return next((trial for trial in self.trials if trial.row.is_best), None)

    def base(self) -> Trial:
        """Return the model before any training, scored on the same rows as the trials.

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
        """Return what each swept key does to the loss; empty without two values to compare.

        Args:
            margin: decides what is equivalent, in nats per token.
            correction: of p-values for several verdicts: `holm` or `fdr_bh`.
            pairs: of three or more numbers: `neighbours` or `all`.

        An argument that is None has the default of `python -m tinyllama_lab report`.

        Raises:
            ConfigError: an argument is out of its bounds.
        """
        from tinyllama_lab.report.findings import findings

        analysis = self._analysis(_settings(margin=margin, correction=correction, pairs=pairs))
        comparison, effects = analysis.comparison, analysis.effects
        sentences = findings(comparison, effects, analysis.cells, analysis.settings.margin)
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
        """Return the cheapest of the settings that cannot be told apart from the best.

        Args:
            margin: of the losses that are close enough to the lowest, in nats per token.
            cost: what to save: `compute`, `memory`, `size`, `time` or `decode`.

        An argument that is None has the default of `python -m tinyllama_lab report`.

        Raises:
            ConfigError: an argument is out of its bounds.
        """
        from tinyllama_lab.report.analysis.ranking import chosen_of
        from tinyllama_lab.report.analysis.tuned import setting_words
        from tinyllama_lab.report.caveats import not_compared
        from tinyllama_lab.report.page.search import read_search

        analysis = self._analysis(_settings(margin=margin, cost=cost))
        comparison, search = analysis.comparison, read_search(self._study)
        recommended = analysis.recommendation
        if search and search.has_own_goals:  # then its goals decide what is best, not the loss
            recommended = analysis.no_recommendation
        cells, sentences = recommended.cells, recommended.advice.sentences
        unit = comparison.measure.unit
        chosen = chosen_of(cells)
        if chosen is None:
            reasons = sentences if comparison.trials else not_compared(comparison)
            return Recommendation({}, None, unit, (), tuple(reasons))
        scored = sorted(chosen.trials, key=lambda trial: trial.loss)
        return Recommendation(
            settings=setting_words([trial.row for trial in scored]),
            loss=chosen.loss,
            unit=unit,
            trials=tuple(Trial(trial.row) for trial in scored),
            sentences=tuple(sentences),
        )

    def notes(self) -> list[str]:
        """Return what limits the verdicts and the recommendation, and how they were made."""
        from tinyllama_lab.report.caveats import caveats, method_notes

        analysis = self._analysis(_settings())
        comparison, effects = analysis.comparison, analysis.effects
        notes = caveats(comparison, effects, analysis.recommendation.cells)
        return [*notes, *method_notes(comparison, effects, analysis.settings)]

    def _analysis(self, settings: Settings) -> Analysis:
        # imported late, since scipy takes most of a second and `load_study` does not need it
        from tinyllama_lab.report.analysis.analysis import Analysis

        if settings not in self._analyses:
            self._analyses[settings] = Analysis(self._rows, settings)
        return self._analyses[settings]

    def __len__(self) -> int:
        return len(self.trials)

    def __repr__(self) -> str:
        """`Study(quickstart: 18 trials, 18 done)`."""
        done = sum(trial.state == "done" for trial in self.trials)
        return f"Study({self.name}: {len(self)} trials, {done} done)"


def load_study(name: str = STUDY, sweeps_dir: str | Path = SWEEPS_DIR) -> Study:
    """Read a study from its folder.

    Args:
        name: of the study, as in `study=<name>`.
        sweeps_dir: the folder that holds the studies.

    Raises:
        StudyError: there is no such study, a file of it is damaged, or `name` is a path.
    """
    path = Path(name)
    if path.name != str(name):
        raise StudyError(
            f"load_study must get the name of a study, got the path {str(name)!r}; "
            f"type load_study({path.name!r}, sweeps_dir={str(path.parent)!r})"
        )
    folder = StudyFolder(user_path(str(sweeps_dir)).absolute(), name)
    study = Study(folder)
    if not study.trials:
        raise folder.no_trials_error()
    return study


def _settings(**arguments: Any) -> Settings:
    """Return how trials are judged: the report's default for every argument that is None.

    Raises:
        ConfigError: an argument is out of its bounds.
    """
    from tinyllama_lab.report.analysis.settings import Settings

    settings = Settings(**{name: value for name, value in arguments.items() if value is not None})
    if problems := settings.problems():
        raise ConfigError(problems)
    return settings


def _cell(value: Any) -> Any:
    """Return a value that pandas can group by: a list becomes one string."""
    return spelled(value) if isinstance(value, list) else value
