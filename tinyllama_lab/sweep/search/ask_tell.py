"""Drives a search: asks Optuna for trials, tells it their results, prunes and resumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinyllama_lab.errors import ConfigError, StudyError
from tinyllama_lab.study.events import Event, read_events
from tinyllama_lab.study.trial import Result, State
from tinyllama_lab.sweep.plan import RETRIED, Plan, Planned, should_rerun
from tinyllama_lab.sweep.search.candidates import Checked, Proposal, TrialFactory, preset_params
from tinyllama_lab.sweep.search.goals import Goals
from tinyllama_lab.sweep.search.outcome import Outcome, read_outcome
from tinyllama_lab.sweep.search.sampling import TrialSampler
from tinyllama_lab.sweep.search.settings import SearchConfig
from tinyllama_lab.sweep.search.space import Space

MOST_REFUSED = 100  # invalid proposals in a row before the search gives up


class AskTell:
    """The `TrialSource` of a search, around Optuna's ask-and-tell interface.

    Args:
        plan: receives the trials.
        space: the settings to search.
        goals: the objectives and constraints.
        sampler: Optuna's study.
        settings: the settings of the search.
        checked: composes the trial of some overrides, or raises ConfigError.
    """

    is_quiet = False

    def __init__(
        self,
        plan: Plan,
        space: Space,
        goals: Goals,
        sampler: TrialSampler,
        settings: SearchConfig,
        checked: Checked,
    ) -> None:
        """Resume the search of a study, or begin it."""
        self.command: Sequence[str] = ()  # for `search.json`
        self._plan = plan
        self._space = space
        self._goals = goals
        self._sampler = sampler
        self._settings = settings
        self._factory = TrialFactory(plan, space, checked)
        self._open: dict[str, list[int]] = {}  # by key, the proposals that wait for its result
        self._waiting: list[Planned] = []  # trials that an earlier command did not finish
        self._to_retry: list[Proposal] = []  # failed, and proposed again
        self._total = _total(space, settings)
        # a worker reserves memory for as many adapters as this, so no more than there are trials
        most = max(1, min(settings.stream.max_concurrent, self._total))
        self.stream = replace(settings.stream, max_concurrent=most)
        self._asked = 0
        self._refused = 0  # invalid proposals in a row
        self._ended = False
        self._replayed: set[str] = set()  # keys whose earlier rungs were reported
        self._latest_rungs: dict[str, tuple[int, Event]] = {}  # by key: proposal, last rung
        self._ended_keys: set[str] = set()  # keys that ended in this command
        self._failed_bases: set[str] = set()  # groups whose base cannot be loaded
        self._preset = preset_params(
            space, settings, self._resume(), self._to_retry, self._factory
        )

    @property
    def left(self) -> int:
        """The number of proposals that are still to come, as far as it is known."""
        more = 0 if self._ended else max(0, self._total - self._asked)
        return len(self._waiting) + more

    @property
    def done(self) -> int:
        """The number of proposals that have a result."""
        return self._asked - sum(map(len, self._open.values()))

    def ask(self, room: int) -> list[Planned]:
        """Return up to `room` more trials; fewer only if no more will come.

        Raises:
            ConfigError: `MOST_REFUSED` proposals in a row were invalid.
        """
        trials, self._waiting = self._waiting[:room], self._waiting[room:]
        while len(trials) < room and not self._is_over():
            planned = self._propose()
            if planned is not None:
                self._plan.trials.append(planned)
                trials.append(planned)
        return trials

    def at_rungs(self, reached: Sequence[tuple[Planned, Event]]) -> list[tuple[Planned, str]]:
        """Report all rungs, and return the trials to prune with the reason.

        All are reported before any is judged, so that trials that arrive together are ranked
        against each other. Of several proposals of the same trial only the first is reported.
        """
        firsts = [
            (planned, self._open[planned.trial.key][0], event)
            for planned, event in reached
            if planned.trial.key in self._open
        ]
        for _, number, event in firsts:
            self._sampler.report(number, event["rung"], _loss(event), event["examples"])
        return [
            (planned, self._reason(event))
            for planned, number, event in firsts
            if self._sampler.should_prune(number)
        ]

    def ended(self, planned: Planned, result: Result) -> None:
        """Tell Optuna the result of a trial; a base that failed to load is not tried again."""
        key = planned.trial.key
        self._ended_keys.add(key)
        if _class(result) == "no_base":
            self._failed_bases.add(planned.group)
            # without another base to try, every further proposal would fail too
            self._ended = self._ended or not self._space.changes_base
        for number in self._open.pop(key, []):
            self._tell(number, result)

    def conclude(self) -> dict[str, float]:
        """Write the outcome so far, and return its metrics."""
        outcome = self.outcome()
        outcome.write(self._plan.study, self.command)
        return outcome.summary()

    def outcome(self) -> Outcome:
        """Return the outcome of the search so far."""
        importances = self._sampler.importances()
        return read_outcome(self._sampler.proposals(), importances, self._goals, self._space)

    def _is_over(self) -> bool:
        return self._ended or self._asked >= self._total

    def _propose(self) -> Planned | None:
        """Return the next trial to train; None if a proposal needs no training or none is left."""
        params = next(self._preset, None)
        if params is None and self._settings.sampler == "grid":
            self._ended = True
            return None
        proposal = self._sampler.ask(params)
        planned = self._possible(proposal)
        if planned is None:
            return None
        key = planned.trial.key
        self._sampler.bind(proposal, key)
        self._asked += 1
        if key in self._open:
            self._open[key].append(proposal.number)
            return None
        result = self._plan.results.get(key) or planned.read_result()[0]
        if result is not None and self._is_final(key, result):
            self._plan.results[key] = result
            self._tell(proposal.number, result)
            return None
        self._open[key] = [proposal.number]
        return planned

    def _is_final(self, key: str, result: Result) -> bool:
        """Return whether a result stands, so that its trial does not run again."""
        return key in self._ended_keys or not should_rerun(result, self._plan.config.retry)

    def _possible(self, proposal: Proposal) -> Planned | None:
        """Return the trial of a proposal; None if it is invalid or its base cannot be loaded.

        Raises:
            ConfigError: more than `MOST_REFUSED` proposals in a row were invalid.
        """
        problem: ConfigError | None = None
        try:
            planned = self._factory.planned(proposal.params)
            if planned.group not in self._failed_bases:
                self._refused = 0
                return planned
        except ConfigError as error:
            problem = error
        self._sampler.tell(proposal.number, "failed", {}, False)
        self._refused += 1
        if self._refused > MOST_REFUSED:
            if problem is not None:
                raise problem
            self._ended = True
        return None

    def _resume(self) -> list[Proposal]:
        """Resume the proposals of earlier commands, and return those that count."""
        kept = []
        # oldest first, so that repeated proposals find the trial of the first one
        for proposal in self._sampler.proposals():
            if proposal.key is None:
                if proposal.state == "running":  # its driver was killed before `bind`
                    self._sampler.tell(proposal.number, "failed", {}, False)
                continue
            if self._is_tried_again(proposal):
                self._to_retry.append(proposal)
                continue
            kept.append(proposal)
            self._asked += 1
            self._take_up(proposal)
        if self._to_retry:
            self._sampler.withdraw([proposal.number for proposal in self._to_retry])
        self._prune_pending()
        return kept

    def _is_tried_again(self, proposal: Proposal) -> bool:
        """Return whether a proposal is proposed again; see `should_rerun`. Pruned ones are not."""
        retry = self._plan.config.retry
        failed = proposal.state not in ("done", "pruned", "running")
        return (proposal.is_retryable and retry != "none") or (failed and retry == "all")

    def _take_up(self, proposal: Proposal) -> None:
        """Resume a proposal that an earlier command bound to a trial."""
        planned = self._factory.planned(proposal.params)
        key = planned.trial.key
        if all(key != other.trial.key for other in self._plan.trials):
            self._plan.trials.append(planned)
        result = planned.read_result()[0]
        if result is not None:
            self._plan.results[key] = result
        if key not in self._replayed:
            self._replayed.add(key)
            self._report_again(proposal, planned)
        if proposal.state != "running":
            self._sampler.settle(proposal.number, proposal.state, proposal.values)
            return
        if result is not None:
            self._tell(proposal.number, result)
        elif key in self._open:
            self._open[key].append(proposal.number)
        else:
            self._open[key] = [proposal.number]
            self._waiting.append(planned)

    def _report_again(self, proposal: Proposal, planned: Planned) -> None:
        """Report the rungs of a trial; a killed driver may not have stored all of them."""
        for event in read_events(planned.trial.events_file):
            if event["kind"] == "rung":
                rung, number = event["rung"], proposal.number
                # the storage has the first `proposal.rungs` rungs already
                is_new = proposal.state == "running" and rung >= proposal.rungs
                report = self._sampler.report if is_new else self._sampler.replay
                report(number, rung, _loss(event), event["examples"])
                self._latest_rungs[planned.trial.key] = number, event

    def _prune_pending(self) -> None:
        """Prune the trials that reached a rung but were not judged before their driver ended."""
        for planned in self._waiting:
            number, event = self._latest_rungs.get(planned.trial.key, (0, None))
            if event is not None and self._sampler.should_prune(number):
                planned.trial.prune(self._reason(event))

    def _tell(self, number: int, result: Result) -> None:
        again = _class(result) in RETRIED
        missing = self._goals.missing(result.metrics) if result.state is State.DONE else []
        self._sampler.tell(number, str(result.state), result.metrics, again)
        # after `tell`, so that the storage is complete when the search ends with the error
        if missing:
            raise StudyError(
                f"a search needs its objectives and constraints from every trial, and "
                f"{result.name} did not log {', '.join(missing)}; it logged "
                f"{', '.join(sorted(result.metrics))}; choose hydra.sweeper.objective from these, "
                "in another study=<name>"
            )

    def _reason(self, event: Event) -> str:
        name = self._settings.pruner
        return f"{name}: held-out loss {_loss(event):.4f} at step {event['step']} is behind"


def _total(space: Space, settings: SearchConfig) -> int:
    """Return the total number of proposals; a grid has at most one for each cell."""
    if settings.sampler != "grid":
        return settings.n_trials or 0
    size = sum(1 for _ in space.cells())
    return size if settings.n_trials is None else min(size, settings.n_trials)


def _loss(event: Event) -> float:
    return float(event["values"]["rung/eval_loss"])


def _class(result: Result) -> str:
    return (result.error or {}).get("class", "")
