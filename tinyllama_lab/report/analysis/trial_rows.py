"""Reads a study as rows: its trials, their bases, and which trial is the best.

A row says whether its trial can be compared with the others. Trials whose data or model has
changed since are outdated. Of the candidates that a study tunes, one represents each setting and
seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tinyllama_lab.config.axes import by_value, flatten, flatten_shown, swept_keys
from tinyllama_lab.metrics import BITS_PER_BYTE, HELDOUT_LOSS
from tinyllama_lab.report.analysis.cross_fit import ranking
from tinyllama_lab.study.evaluations import HELDOUT, MergedEvaluations, join_bases, read_merged
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import (
    EVAL,
    Result,
    State,
    TrialFolder,
    canonical_json,
    contest_key,
    digest,
    trial_key,
)

_PLACE = ("source", "path", "repo", "config", "revision", "split", "eval_path", "eval_split")
_LABELS = ("data.name", "data.path", "data.eval_path")  # names of the content, not the content


@dataclass(frozen=True)
class _Evaluated:
    """A trial scored on one kind of rows; its configuration holds the evaluation that is shown."""

    config: dict[str, Any]
    evaluations: MergedEvaluations


_Trials = dict[TrialFolder, _Evaluated]


@dataclass(frozen=True)
class TrialRow:
    """A trial, or a base if `is_base`; `swept` holds its values of the swept keys."""

    trial: TrialFolder
    result: Result | None
    evaluations: MergedEvaluations
    swept: dict[str, Any]
    is_base: bool = False
    is_best: bool = False
    base: MergedEvaluations | None = None  # of the base that the trial is compared with
    settings: dict[str, Any] = field(default_factory=dict, compare=False)  # by dotted key
    tuned: tuple[str, ...] = ()  # the settings that its study tunes
    contest: str = ""  # equal for all candidates of one setting and seed; empty without tuning
    is_beaten: bool = False  # another tuned value represents its setting and seed
    outdated: str = ""  # why it is not compared with trials on newer content; empty if it is

    @property
    def is_done(self) -> bool:
        """Whether the trial has a result of a complete run."""
        return self.result is not None and self.result.state is State.DONE

    @property
    def is_candidate(self) -> bool:
        """Whether it is one of the candidates that tune its setting."""
        return bool(self.contest)

    @property
    def tuned_value(self) -> str:
        """Its values of the tuned settings, as JSON."""
        return canonical_json([self.settings.get(key) for key in self.tuned])

    def metric(self, name: str) -> float | None:
        """Return a metric of the result; None where it is missing, NaN or infinite."""
        value = self.result.metrics.get(name) if self.result else None
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class StudyRows:
    """Everything that a study measured, read at one moment.

    Attributes:
        trials: bases first, then the trials by which settings are chosen, ordered by their swept
            values, outdated ones last. The best one is marked.
        confirmation: the trials that confirm a choice. They were never scored on the held-out
            rows by which the others are chosen. Their `swept` has the seed as well.
        rescored: those of `trials` that were scored on the confirmation rows too, with those
            scores. Their `swept` has the seed as well.
    """

    trials: list[TrialRow]
    confirmation: list[TrialRow] = field(default_factory=list)
    rescored: list[TrialRow] = field(default_factory=list)


def read_study(study: StudyFolder) -> StudyRows:
    """Read every trial folder of a study once.

    A key is swept if its values differ among the trials on the newest data and model.

    Raises:
        StudyError: a configuration or `tuned.json` is damaged.
    """
    choosing, confirming, rescored = _read_trials(study)
    trials = _choosing_rows(study, choosing)
    keys = list(dict.fromkeys(key for row in trials for key in row.swept) | {"seed": None})
    return StudyRows(
        trials,
        _rows_by_value(study, confirming, keys),
        _rows_by_value(study, rescored, keys),
    )


def _choosing_rows(study: StudyFolder, trials: _Trials) -> list[TrialRow]:
    """Return the bases and the trials by which settings are chosen, as in `StudyRows.trials`."""
    rows = _rows(study, trials)
    reasons = outdated(rows)
    configs = {trial: evaluated.config for trial, evaluated in trials.items()}
    keys = _keys([config for trial, config in configs.items() if trial.key not in reasons])
    rows = [
        replace(row, outdated=reasons.get(row.trial.key, ""))
        for row in _with_values(rows, trials, keys)
    ]
    rows.sort(key=lambda row: (bool(row.outdated), _sort_key(row)))
    return [*_bases(rows), *_mark_best(_settle(rows, study.read_tuned(), configs))]


def _rows_by_value(study: StudyFolder, trials: _Trials, keys: Sequence[str]) -> list[TrialRow]:
    """Return rows with the values of these keys, ordered by them."""
    return sorted(_with_values(_rows(study, trials), trials, keys), key=_sort_key)


def _sort_key(row: TrialRow) -> list[tuple[bool, float, str]]:
    return [by_value(value) for value in row.swept.values()]


def _read_trials(study: StudyFolder) -> tuple[_Trials, _Trials, _Trials]:
    """Read the trials of a study, by the rows that they were scored on.

    Returns:
        The trials scored on held-out rows, all other trials, and those of the first group that
        were scored on the confirmation rows too. Without held-out scores, all trials are in the
        first group.
    """
    choosing, others, rescored = _Trials(), _Trials(), _Trials()
    for trial in study.trials():
        config = trial.read_config()
        by_rows = read_merged(trial, config[EVAL])
        for rows, evaluations in by_rows.items():
            group = choosing if rows == HELDOUT else rescored if HELDOUT in by_rows else others
            group[trial] = _Evaluated({**config, EVAL: evaluations.settings}, evaluations)
    return (choosing, others, rescored) if choosing else (others, _Trials(), rescored)


def _keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the swept keys; keys of the evaluation only where nothing else tells trials apart."""
    keys = swept_keys(configs)
    # earlier versions had one trial for each evaluation, so only its settings tell them apart
    if len({trial_key(config) for config in configs}) < len(configs):
        return keys
    return [key for key in keys if not key.startswith(f"{EVAL}.")]


def _rows(study: StudyFolder, trials: _Trials) -> list[TrialRow]:
    """Return the trials as rows, without the values of swept keys."""
    bases: dict[tuple[TrialFolder, ...], MergedEvaluations] = {}
    return [
        TrialRow(
            trial,
            evaluated.evaluations.result,
            evaluated.evaluations,
            {},
            base=_base_of(study, evaluated, bases),
            settings=flatten(evaluated.config),
        )
        for trial, evaluated in trials.items()
    ]


def _base_of(
    study: StudyFolder, scored: _Evaluated, known: dict[tuple[TrialFolder, ...], MergedEvaluations]
) -> MergedEvaluations:
    """Return the evaluations of the base that belong to those of a trial."""
    evaluations = scored.evaluations
    settings = [part.settings for part in evaluations.parts] or [evaluations.settings]
    by_base = {study.base({**scored.config, EVAL: part}, "base"): part for part in settings}
    if tuple(by_base) not in known:
        several = [read_merged(base, part)[part["rows"]] for base, part in by_base.items()]
        known[tuple(by_base)] = join_bases(several)
    return known[tuple(by_base)]


def _with_values(rows: Sequence[TrialRow], trials: _Trials, keys: Sequence[str]) -> list[TrialRow]:
    shown = {trial: flatten_shown(evaluated.config) for trial, evaluated in trials.items()}
    return [replace(row, swept={key: shown[row.trial].get(key) for key in keys}) for row in rows]


def _bases(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return one row for each base: a model, its quantization and its held-out set.

    Evaluations that differ in nothing else, such as the number of generations, share a row.
    """
    by_base: dict[str, list[tuple[MergedEvaluations, dict[str, Any]]]] = {}
    for row in rows:
        if row.base is None or row.outdated:
            continue
        values = {k: v for k, v in row.swept.items() if k.startswith(("model.", "quant."))}
        identity = {
            key: value
            for key, value in row.settings.items()
            if key == "model.identity" or key.startswith(("quant.", "train.precision"))
        }
        trained = row.base.trained
        scored_on = trained.data.get("eval_fingerprint") if trained else row.base.trial.key
        by_base.setdefault(digest([identity, scored_on]), []).append((row.base, values))
    rows_of_bases = []
    for same_base in by_base.values():
        merged = join_bases([base for base, _ in same_base])
        _, values = same_base[0]
        rows_of_bases.append(TrialRow(merged.trial, merged.result, merged, values, is_base=True))
    return rows_of_bases


def _mark_best(rows: list[TrialRow]) -> list[TrialRow]:
    """Mark the lowest held-out loss, if the rows were scored on the same tokens or text."""
    name = ranked_by(rows)
    losses = {id(row): row.metric(name) for row in _compared(rows) if name and _stands(row)}
    ranked = {key: loss for key, loss in losses.items() if loss is not None}
    best = min(ranked, key=lambda key: ranked[key], default=None)
    return [replace(row, is_best=True) if id(row) == best else row for row in rows]


def _compared(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Return the trials that are done and not outdated."""
    return [row for row in rows if row.is_done and not row.is_base and not row.outdated]


def _stands(row: TrialRow) -> bool:
    """Whether the trial represents its setting: tuned if the study tunes, and not beaten."""
    return not row.is_beaten and (row.is_candidate or not row.tuned)


def ranked_by(rows: Sequence[TrialRow]) -> str:
    """Return the metric that can be compared between all rows; empty where there is none.

    It is the loss per token. Where the held-out tokens or the base models differ and the text is
    the same, it is bits per byte.
    """
    results = [row.result for row in _compared(rows) if row.result]
    bases = {r.model.get("revision") for r in results}  # one model may have several names
    if len({r.data.get("eval_fingerprint") for r in results}) <= 1 and len(bases) <= 1:
        return HELDOUT_LOSS
    texts = {r.data.get("eval_text_fingerprint") for r in results}
    return BITS_PER_BYTE if len(texts) == 1 and None not in texts else ""


def outdated(trials: Iterable[TrialRow]) -> dict[str, str]:
    """Return why trials are not compared with the newest ones, by the key of the trial.

    The content behind a name (a file, a repository, this package) can change between two commands.
    The content that the newest trial saw counts. Training rows can differ although the content is
    the same, because another version of this project or of a tokenizer reads it.
    """
    ended = sorted((row for row in trials if row.result is not None), key=_ended)
    reasons: dict[str, str] = {}
    for where, content, reason in (
        (_place("model"), _identity("model"), lambda _: "its model was changed since"),
        (_place("data"), _identity("data"), _data_changed),
        (_data_settings, _training_rows, _other_rows),
    ):
        current = [row for row in ended if row.trial.key not in reasons]
        reasons |= {row.trial.key: reason(row) for row in _older(current, where, content)}
    return reasons


def _older(
    rows: Sequence[TrialRow], where: Callable[[TrialRow], str], content: Callable[[TrialRow], Any]
) -> list[TrialRow]:
    """Return the rows before the newest scored one of their place that have other content."""
    newest = {
        where(row): (number, content(row))
        for number, row in enumerate(rows)
        if row.result and row.result.state is State.DONE and content(row) is not None
    }
    return [
        row
        for number, row in enumerate(rows)
        if (newest_seen := newest.get(where(row)))
        and number < newest_seen[0]
        and content(row) not in (None, newest_seen[1])
    ]


def _ended(row: TrialRow) -> float:
    return row.trial.result_file.stat().st_mtime


def _place(group: str) -> Callable[[TrialRow], str]:
    return lambda row: canonical_json([row.settings.get(f"{group}.{name}") for name in _PLACE])


def _identity(group: str) -> Callable[[TrialRow], Any]:
    return lambda row: row.settings.get(f"{group}.identity")


def _data_settings(row: TrialRow) -> str:
    """Return a key that is equal for trials that must have the same training rows."""
    settings = row.settings
    data_settings = {
        k: v for k, v in settings.items() if k.startswith("data.") and k not in _LABELS
    }
    seed = settings.get("seed") if settings.get("data.subset") == "seed" else None
    return canonical_json([data_settings, settings.get("model.identity"), seed])


def _training_rows(row: TrialRow) -> Any:
    return row.result.data.get("train_fingerprint") if row.result else None


def _data_changed(row: TrialRow) -> str:
    container = "file" if row.settings.get("data.path") else "set"
    return f"its data {container} was changed since"


def _other_rows(row: TrialRow) -> str:
    return (
        f"it was trained on other rows ({_training_rows(row)}) than the newest trial with the "
        "same data settings"
    )


def _settle(
    rows: Sequence[TrialRow],
    tuned: Mapping[str, Any],
    configs: Mapping[TrialFolder, dict[str, Any]],
) -> list[TrialRow]:
    """Return the rows with the tuning's contests filled in and the beaten candidates marked.

    Args:
        rows: trials of one study.
        tuned: what `StudyFolder.read_tuned` returned.
        configs: the configuration of every trial.
    """
    if not tuned:
        return list(rows)
    keys, candidates = tuple(tuned["values"]), frozenset(tuned["keys"])
    settled = []
    settings: dict[str, dict[str, list[TrialRow]]] = {}  # contests (one a seed) by setting
    for row in rows:
        config = configs[row.trial]
        contest = contest_key(config, keys) if row.trial.key in candidates else ""
        settled.append(replace(row, tuned=keys, contest=contest))
        if contest:
            contests = settings.setdefault(contest_key(config, (*keys, "seed")), {})
            contests.setdefault(contest, []).append(settled[-1])
    beaten = {
        id(row)
        for contests_of_setting in settings.values()
        for row in _beaten(list(contests_of_setting.values()))
    }
    return [replace(row, is_beaten=True) if id(row) in beaten else row for row in settled]


def _beaten(contests: Sequence[Sequence[TrialRow]]) -> Iterator[TrialRow]:
    """Yield the candidates of one setting that do not represent their contest.

    All seeds choose one value together. Where the chosen value was ended, the next best one
    represents that seed. While a contest is still running, no candidate represents it.
    """
    order = ranking([_losses(contest) for contest in contests if _is_over(contest)])
    for contest in contests:
        best = min(contest, key=lambda row: _rank(row, order)) if _is_over(contest) else None
        yield from (row for row in contest if row is not best and row.result)


def _is_over(contest: Sequence[TrialRow]) -> bool:
    return all(row.result for row in contest)


def _losses(contest: Sequence[TrialRow]) -> dict[str, float]:
    """Return the losses of the candidates that are done, by tuned value."""
    losses = {row.tuned_value: row.metric(HELDOUT_LOSS) for row in contest if row.is_done}
    return {value: loss for value, loss in losses.items() if loss is not None}


def _rank(row: TrialRow, order: Sequence[str]) -> tuple[int, bool]:
    """Return the sort key of a candidate: done ones by the rank of their value.

    If no candidate is done, a failed one comes before a pruned one. It then represents the
    contest, which shows that its setting has lost a run.
    """
    is_pruned = row.result is not None and row.result.state is State.PRUNED
    has_loss = bool(_losses([row]))
    return order.index(row.tuned_value) if has_loss else len(order), is_pruned
