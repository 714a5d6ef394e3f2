"""Optuna's study: it proposes trials, receives results, and decides which to prune.

This is the only module that imports optuna.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from tinyllama_lab.errors import StudyError, shown, without_password
from tinyllama_lab.metrics import MAXIMIZE, MINIMIZE
from tinyllama_lab.report.analysis.importance import LEAST_TRIALS
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.search.candidates import Proposal
from tinyllama_lab.sweep.search.goals import Goals
from tinyllama_lab.sweep.search.journal import Journal
from tinyllama_lab.sweep.search.settings import NODE, SearchConfig
from tinyllama_lab.sweep.search.space import Axis, Choice, Space, Value

_KEY, _BEGUN_WITH, _AGAIN, _OWNER = "key", "begun_with", "again", "owner"
_WITHDRAWN = "withdrawn"
_STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_DIRECTIONS = {MINIMIZE: StudyDirection.MINIMIZE, MAXIMIZE: StudyDirection.MAXIMIZE}
_BROKEN = 1e30  # for a constraint whose metric is missing: databases cannot store infinity
# the Wilcoxon pruner compares trials step by step: each held-out row is a step of its own
_ROW = 10_000  # steps that a rung takes, more than it has rows
_MOST = 3  # differences in a message


class TrialSampler:
    """Optuna's view of a study. One driver at a time uses it, so proposals never collide.

    Args:
        study: the study.
        space: the settings to search.
        goals: the objectives and constraints.
        settings: the settings of the search.
        begun_with: the settings that must equal those of the search in the storage.
    """

    def __init__(
        self,
        study: StudyFolder,
        space: Space,
        goals: Goals,
        settings: SearchConfig,
        begun_with: dict[str, str],
    ) -> None:
        """Open the search of a study, or create it.

        Raises:
            StudyError: the storage cannot be reached, or its search of this name has other
                settings or belongs to another folder.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._space, self._goals, self._settings = space, goals, settings
        try:
            self._study = optuna.create_study(
                study_name=study.name,
                storage=_open_storage(study, settings.storage),
                directions=[_DIRECTIONS[way] for way in goals.directions],
                load_if_exists=True,
            )
            count = len(self._study.get_trials(deepcopy=False))
            self._check_same(study, begun_with, count)
        except StudyError:
            raise
        except Exception as error:  # every database driver has errors of its own
            raise _unreachable_error(settings.storage, error) from error
        self._sampler = _sampler(settings, space, count)
        self._study.sampler = self._sampler
        self._trials: dict[int, optuna.trial.Trial] = {}
        # this study is only in memory: after a restart, the trials' events bring its rungs back
        self._pruner_study = optuna.create_study(
            study_name=study.name, pruner=_pruner(settings), sampler=_FixedSampler({})
        )
        self._halving = _halving(settings)
        self._pruner_trials: list[optuna.trial.Trial] = []

    def proposals(self) -> list[Proposal]:
        """Return all proposals so far, oldest first."""
        withdrawn = self._study.user_attrs.get(_WITHDRAWN, [])
        return [
            Proposal(
                trial.number,
                dict(trial.params),
                trial.user_attrs.get(_KEY),
                _STATES[trial.state],
                tuple(trial.values or ()),
                _AGAIN in trial.user_attrs or trial.number in withdrawn,
                all(excess <= 0 for excess in trial.constraints.values()),
                len(trial.intermediate_values),
            )
            for trial in self._study.get_trials(deepcopy=False)
        ]

    def withdraw(self, numbers: Sequence[int]) -> None:
        """Mark failed proposals, whose parameters are proposed again, as retryable."""
        known = self._study.user_attrs.get(_WITHDRAWN, [])
        # of the study, because Optuna refuses to change a finished trial
        self._study.set_user_attr(_WITHDRAWN, sorted({*known, *numbers}))

    def ask(self, params: Mapping[str, Value] | None = None) -> Proposal:
        """Return a new proposal, with these `params` if they are given."""
        if params is not None:
            self._study.sampler = _FixedSampler(params)
        try:
            trial = self._study.ask()
            chosen: dict[str, Value] = {}
            # parents come first, so the values that conditions need are known
            for axis in self._space.axes:
                if self._space.applies(axis, chosen):
                    chosen[axis.key] = _suggest(trial, axis)
        finally:
            self._study.sampler = self._sampler
        self._trials[trial.number] = trial
        return Proposal(trial.number, chosen)

    def bind(self, proposal: Proposal, key: str) -> None:
        """Store the key of a proposal's trial; only a bound proposal counts."""
        self._trial(proposal.number).set_user_attr(_KEY, key)

    def report(self, number: int, rung: int, loss: float, examples: Sequence[float]) -> None:
        """Report the held-out loss at a rung, as the mean and for every row."""
        self._trial(number).report(loss, rung + 1)  # steps start at 1; for the dashboard and TPE
        self.replay(number, rung, loss, examples)

    def replay(self, number: int, rung: int, loss: float, examples: Sequence[float]) -> None:
        """Report a rung only to the pruner: an earlier command has stored it."""
        if self._halving is not None:
            self._halving.report(number, rung, loss)
        elif self._settings.pruner == "median":
            self._pruner_trial(number).report(loss, rung)
        else:
            for row, value in enumerate(examples):
                self._pruner_trial(number).report(value, rung * _ROW + row)

    def should_prune(self, number: int) -> bool:
        """Return whether the pruner would end a trial at its last reported rung."""
        if self._halving is not None:
            return self._halving.should_prune(number)
        return self._pruner_trial(number).should_prune()

    def tell(self, number: int, state: str, metrics: Mapping[str, float], again: bool) -> None:
        """Record how a trial ended; one without its objectives counts as failed."""
        trial, values = self._trial(number), self._goals.values(metrics)
        if state == "done" and values is not None:
            for name, excess in self._goals.excesses(metrics).items():
                trial.set_constraint(name, min(excess, _BROKEN))
            # a killed driver may have stored this result already
            self._study.tell(trial, values, skip_if_finished=True)
            self._settle(number, TrialState.COMPLETE, values[0])
        elif state == "pruned":
            self._study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            self._settle(number, TrialState.PRUNED)
        else:
            if again:
                trial.set_user_attr(_AGAIN, True)
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            self._settle(number, TrialState.FAIL)

    def importances(self) -> dict[str, float]:
        """Return the importance of each setting for the first objective; they sum to 1.

        Empty with fewer than `LEAST_TRIALS` finished trials, which would give meaningless values.
        """
        if sum(proposal.state == "done" for proposal in self.proposals()) < LEAST_TRIALS:
            return {}
        sign = -1 if self._goals.directions[0] == MAXIMIZE else 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                shares = optuna.importance.get_param_importances(
                    self._study, target=lambda trial: sign * trial.values[0]
                )
            except (ValueError, RuntimeError):  # too few trials, or all with equal parameters
                return {}
        # Optuna warns, and returns equal shares, if all trials have the same objective
        are_equal = any("will be equal" in str(warning.message) for warning in caught)
        return {} if are_equal else shares

    def _settle(self, number: int, state: TrialState, value: float | None = None) -> None:
        """Record the end in the pruner's study: some pruners compare with finished trials."""
        self._pruner_study.tell(self._pruner_trial(number), value, state, skip_if_finished=True)

    def settle(self, number: int, state: str, values: Sequence[float]) -> None:
        """Record in the pruner's study how a trial of an earlier command ended."""
        states = {name: state for state, name in _STATES.items()}
        self._settle(number, states[state], values[0] if state == "done" else None)

    def _trial(self, number: int) -> optuna.trial.Trial:
        if number not in self._trials:  # proposed by an earlier command
            # Optuna has no public way to continue a running trial of another process
            frozen = self._study.get_trials(deepcopy=False)[number]
            self._trials[number] = optuna.trial.Trial(self._study, frozen._trial_id)
        return self._trials[number]

    def _pruner_trial(self, number: int) -> optuna.trial.Trial:
        while len(self._pruner_trials) <= number:
            # all trials up to this one: both studies must count alike
            self._pruner_trials.append(self._pruner_study.ask())
        return self._pruner_trials[number]

    def _check_same(self, study: StudyFolder, now: dict[str, str], proposed: int) -> None:
        attributes = self._study.user_attrs
        if attributes.get(_OWNER, study.owner()) != study.owner():
            raise _other_folder_error(study)
        # proposals without a record were not made by a search of this project
        before = attributes.get(_BEGUN_WITH, {} if proposed else None)
        if before is None:
            self._study.set_user_attr(_BEGUN_WITH, now)
        elif before != now:
            raise _other_settings_error(study, before, now)
        if _OWNER not in attributes:
            self._study.set_user_attr(_OWNER, study.owner())


class _FixedSampler(BaseSampler):
    """Proposes fixed parameters."""

    def __init__(self, params: Mapping[str, Value]) -> None:
        self._params = params

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Value:
        return self._params[name]


def _suggest(trial: optuna.trial.Trial, axis: Axis) -> Value:
    if isinstance(axis, Choice):
        value: Value = trial.suggest_categorical(axis.key, axis.values)
        return value
    if axis.is_integer:
        step = 1 if axis.log else int(axis.step or 1)
        return trial.suggest_int(axis.key, int(axis.low), int(axis.high), step=step, log=axis.log)
    return trial.suggest_float(axis.key, axis.low, axis.high, step=axis.step, log=axis.log)


def _sampler(settings: SearchConfig, space: Space, proposed: int) -> BaseSampler:
    """Return the sampler, seeded with the number of earlier proposals.

    With the same seed after every restart it would repeat its first proposals.
    """
    seed = settings.seed + proposed
    samplers = optuna.samplers
    if settings.sampler == "tpe":
        # `group=True` models the settings of each branch apart
        if space.conditions:
            return samplers.TPESampler(seed=seed, multivariate=True, group=True)
        return samplers.TPESampler(seed=seed)
    if settings.sampler == "cmaes":
        return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    if settings.sampler == "nsgaii":
        return samplers.NSGAIISampler(
            seed=seed, population_size=max(8, settings.stream.max_concurrent)
        )
    return samplers.RandomSampler(seed=seed)


def _halving(settings: SearchConfig) -> Halving | None:
    if settings.pruner == "hyperband":
        return Halving(settings.reduction_factor, len(settings.rungs) + 1)
    return Halving(settings.reduction_factor) if settings.pruner == "halving" else None


def _pruner(settings: SearchConfig) -> BasePruner:
    if settings.pruner == "wilcoxon":
        return optuna.pruners.WilcoxonPruner()
    return optuna.pruners.MedianPruner()


def _open_storage(study: StudyFolder, url: str | None) -> BaseStorage | str:
    """Return the storage: a URL, or a journal in the study's folder."""
    if url is not None:
        return url
    journal: Any = Journal(study)
    return JournalStorage(journal)


class Halving:
    """Successive halving and Hyperband: one in `factor` trials continues at every rung.

    Optuna judges a trial against those that were reported before it. In a pack, all adapters
    reach a rung at the same step, so the first one would always continue. Here all of them are
    reported before any is judged. The algorithm is that of Li et al., "A System for Massively
    Parallel Hyperparameter Tuning" (2020), without late promotions: a pruned trial stays pruned.

    With several brackets (Hyperband), the number of a trial decides its bracket. A trial is
    compared only within its bracket, and bracket `b` is not judged at the first `b` rungs.
    """

    def __init__(self, factor: int, brackets: int = 1) -> None:
        self._factor = factor
        self._brackets = brackets
        self._losses: dict[tuple[int, int], dict[int, float]] = {}  # by bracket and rung
        self._last: dict[int, int] = {}  # the rung that a trial reported last

    def report(self, number: int, rung: int, loss: float) -> None:
        """Record the held-out loss of a trial at a rung; NaN and infinity count as the worst."""
        peers = self._losses.setdefault((number % self._brackets, rung), {})
        peers[number] = loss if math.isfinite(loss) else math.inf
        self._last[number] = rung

    def should_prune(self, number: int) -> bool:
        """Return whether a trial is not among the best that have reported its rung so far."""
        bracket, rung = number % self._brackets, self._last[number]
        if rung < bracket:
            return False
        peers = self._losses[bracket, rung]
        # at least one continues, however few have arrived
        kept = max(1, len(peers) // self._factor)
        return peers[number] > sorted(peers.values())[kept - 1] or peers[number] == math.inf


def _other_settings_error(
    study: StudyFolder, before: dict[str, str], now: dict[str, str]
) -> StudyError:
    """Return the error for a search that continues with another space or other settings."""
    return StudyError(
        f"a search must continue with the settings it began with; study {study.name} began with "
        f"{_differences(before, now)}; take another study=<name>"
    )


def _other_folder_error(study: StudyFolder) -> StudyError:
    """Return the error for a search in the storage that belongs to another folder.

    Its results are in that folder, so a second driver would wait for trials that it cannot see.
    """
    return StudyError(
        f"a search has one folder, and the search {study.name} in {NODE}.storage does not belong "
        f"to {study.folder}; take another study=<name>, or repeat the command in its own folder"
    )


def _unreachable_error(url: str | None, error: Exception) -> StudyError:
    """Return the error for a storage that Optuna cannot read or write."""
    address = without_password(url) if url else "the journal optuna.log in the study's folder"
    why = without_password(" ".join(str(error).split()))[:200]
    return StudyError(
        f"{NODE}.storage must be a place that Optuna can read and write, got {address} "
        f"({type(error).__name__}: {why}); set it to null for a file of the study"
    )


def _differences(before: dict[str, str], now: dict[str, str]) -> str:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    pairs = [(key, before.get(key, "nothing"), now.get(key, "nothing")) for key in keys[:_MOST]]
    texts = [f"{key}: {shown(old, 300)} (now {shown(new, 300)})" for key, old, new in pairs]
    more = f" and {len(keys) - _MOST} more" if len(keys) > _MOST else ""
    return f"{', '.join(texts)}{more}"
