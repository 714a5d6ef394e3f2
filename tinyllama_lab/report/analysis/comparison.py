"""Selects the trials that may be compared with each other, and says why the others may not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from textwrap import shorten
from typing import Any

import numpy as np

from tinyllama_lab.config.axes import show, words
from tinyllama_lab.metrics import BITS_PER_BYTE, METRICS
from tinyllama_lab.report.analysis.cross_fit import cross_fitted, first_half
from tinyllama_lab.report.analysis.example_losses import read_losses
from tinyllama_lab.report.analysis.measure import NATS, Measure
from tinyllama_lab.report.analysis.statistics import Array, Estimate, Ids, Luck, compare
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.analysis.tuned import cross_fit_note, edge_notes
from tinyllama_lab.study.trial import State, canonical_json, digest

SEED = "seed"

NO_INTERVAL = "which gives no interval"
OWN_SETS = ("data.eval_path", "data.eval_split")  # settings that name separate held-out rows
ABSENT = ": no result"  # the reason of a trial that is still running or was never started


@dataclass(frozen=True, eq=False)
class Scored:
    """A trial that is done, with the loss of every held-out example.

    The losses of a trial that represents a tuned setting are cross-fitted; see `cross_fit`.
    """

    row: TrialRow
    label: str
    losses: Array  # [examples] summed over the supervised tokens, nats (or as `measure` says)
    tokens: Array  # [examples] supervised tokens (or bytes), by which the sum is divided
    base: str  # the model and its revision
    fingerprint: str  # of the held-out tokens and the mask
    settings: dict[str, Any]  # every key of its configuration, flat
    clusters: Ids | None = None  # [examples] equal for those that belong together
    bytes: Array | None = None  # [examples] of the supervised text, UTF-8
    measure: Measure = NATS
    # by tuned value, the losses of all finished candidates of its contest (`TrialRow.contest`)
    finished: Mapping[str, Array] = field(default_factory=dict)

    @property
    def own_losses(self) -> Array:
        """The losses of this trial itself, `[examples]`."""
        return self.finished.get(self.row.tuned_value, self.losses)

    @property
    def optimism(self) -> float:
        """How far the mean of `own_losses` is below the cross-fitted mean, in `measure.unit`."""
        return float((self.losses - self.own_losses).sum() / self.tokens.sum())

    @property
    def seed(self) -> Any:
        """The seed of its training run."""
        return self.settings.get(SEED)

    @property
    def loss(self) -> float:
        """Mean loss in the unit of `measure`."""
        return float(self.losses.sum() / self.tokens.sum())

    @property
    def scored_on(self) -> tuple[str, str, str]:
        """Equal for trials that may be compared: base, fingerprint, and a check.

        The check is a hash of the number of tokens of every example and of the version of the
        rules that turn rows into tokens.
        """
        rendering = self.settings.get("data.rendering")
        return self.base, self.fingerprint, digest([self.tokens.tolist(), rendering])

    @property
    def text(self) -> str:
        """Equal for trials scored on the same text, whatever its tokens; empty if unknown."""
        facts = self.row.result.data if self.row.result else {}
        fingerprint = facts.get("eval_text_fingerprint")
        if not fingerprint or self.bytes is None:
            return ""
        return digest([fingerprint, self.bytes.tolist()])

    @property
    def environment(self) -> dict[str, Any]:
        """The code, machine and precision that the trial ran with."""
        return self.row.result.environment if self.row.result else {}

    @property
    def is_packed(self) -> bool:
        """Whether other trials trained together with it and shared its time and memory."""
        return (self.environment.get("adapters_at_once") or 1) > 1

    def measured(
        self, measure: Measure, losses: Array, tokens: Array, clusters: Ids | None
    ) -> Scored:
        """Return the same trial with its losses in another measure."""
        return replace(
            self, measure=measure, losses=losses, tokens=tokens, clusters=clusters, finished={}
        )

    def metric(self, name: str) -> float | None:
        """Return a metric of its result; None where it is missing, NaN or infinite."""
        return self.row.metric(name)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Trials scored on the same held-out tokens or text, and why others are left out."""

    trials: list[Scored]
    keys: list[str]  # the swept keys, without the seed
    left_out: list[str]
    lost: list[TrialRow] = field(default_factory=list)  # failed, diverged, or out of memory
    tried: dict[str, list[Any]] = field(default_factory=dict)  # values by key, scored or not
    tuning: list[str] = field(default_factory=list)  # notes on what the tuning leaves open

    @property
    def measure(self) -> Measure:
        """The unit of the losses."""
        return self.trials[0].measure if self.trials else NATS

    def cells(self) -> dict[str, list[Scored]]:
        """Return the trials by cell; the trials of a cell differ in nothing but their seed."""
        cells: dict[str, list[Scored]] = {}
        for trial in self.trials:
            cells.setdefault(cell_of(trial.row, self.keys), []).append(trial)
        return cells

    def whole_cells(self) -> list[list[Scored]]:
        """Return the cells that lost no run, each with the seeds that all or most of them share.

        A cell whose bad runs failed would win by its good ones. If every cell lost a run, all
        count.
        """
        lost = {cell_of(row, self.keys) for row in self.lost}
        cells = self.cells()
        kept = [cell for name, cell in cells.items() if name not in lost] or list(cells.values())
        sets = [frozenset(trial.seed for trial in cell) for cell in kept]
        seeds = frozenset.intersection(*sets) if sets else frozenset()
        seeds = seeds or shared_seeds(sets)
        on_seeds = [[trial for trial in cell if trial.seed in seeds] for cell in kept]
        return [cell for cell in on_seeds if len(cell) == len(seeds)]


def paired(ours: Sequence[Scored], theirs: Sequence[Scored], luck: Luck) -> Estimate:
    """Estimate the mean loss of `ours` minus that of `theirs`, paired by seed and example."""
    pairs = zip(ours, theirs, strict=True)
    differences = np.stack([one.losses - other.losses for one, other in pairs])
    return compare(differences, ours[0].tokens, luck, ours[0].clusters)


def cell_of(row: TrialRow, keys: Sequence[str], without: str = "") -> str:
    """Return a key that is equal for trials of one cell.

    Args:
        row: a trial.
        keys: the swept keys, without the seed.
        without: a key whose value does not count.
    """
    return canonical_json({key: row.swept.get(key) for key in keys if key != without})


def shared_seeds(sets: Sequence[frozenset[Any]]) -> frozenset[Any]:
    """Return the seeds with which most runs can be compared, every cell on the same ones.

    Args:
        sets: the seeds of each cell.
    """
    different = sorted(filter(None, set(sets)), key=lambda seeds: sorted(map(str, seeds)))

    def usable_runs(shared: frozenset[Any]) -> int:
        return len(shared) * sum(shared <= seeds for seeds in sets)

    return max(different, key=usable_runs, default=frozenset())


def make_comparison(rows: Sequence[TrialRow], by_text: bool = True) -> Comparison:
    """Select the largest set of trials that may be compared.

    These are trials of one base on the same tokens. With `by_text`, trials with different bases or
    tokens but the same text are taken instead if they are more.

    Args:
        rows: bases and trials, as in `StudyRows.trials`.
        by_text: whether trials with different tokens for the same text may be compared.
    """
    scored, left_out = [], []
    beaten = [row for row in rows if row.is_beaten and row.is_done]
    for row in rows:
        if row.is_base or row.is_beaten:
            continue
        trial_or_reason = _scored(row)
        if isinstance(trial_or_reason, str):
            left_out.append(trial_or_reason)
        else:
            scored.append(_with_finished(trial_or_reason, beaten))
    kept = _one_a_seed(_largest_set(scored, left_out, by_text), left_out)
    keys = list(dict.fromkeys(key for trial in kept for key in trial.row.swept))
    tuned = kept[0].row.tuned if kept else ()
    keys = [key for key in keys if key not in tuned]  # each setting has its own best value
    differ = [key for key in keys if len({show(t.row.swept.get(key)) for t in kept}) > 1]
    same = [key for key in keys if key not in differ and key != SEED]
    eligible = [row for row in rows if not (row.is_base or row.is_beaten or row.outdated)]
    alike = [row for row in eligible if _agrees(row, kept, same)]
    lost = [row for row in alike if _ended_badly(row)]
    swept = [key for key in differ if key != SEED]
    tried = {key: [row.swept.get(key) for row in alike] for key in swept}
    tuning = edge_notes(rows)
    if any(len(trial.finished) > 1 for trial in kept):
        kept = _cross_fitted(kept, swept)
        tuning.append(cross_fit_note(tuned, len({trial.seed for trial in kept})))
    return Comparison(kept, swept, _said_once(left_out), lost, tried, tuning)


def _with_finished(trial: Scored, beaten: Sequence[TrialRow]) -> Scored:
    """Return the trial with the losses of the candidates it beat, on the same held-out tokens."""
    if not trial.row.is_candidate:
        return trial
    others = [_scored(row) for row in beaten if row.contest == trial.row.contest]
    every = [trial, *(other for other in others if isinstance(other, Scored))]
    finished = {t.row.tuned_value: t.losses for t in every if t.scored_on == trial.scored_on}
    return replace(trial, finished=finished)


def _cross_fitted(trials: list[Scored], keys: Sequence[str]) -> list[Scored]:
    """Replace the losses of tuned settings by losses that had no part in choosing the value."""
    half = first_half(trials[0].tokens, trials[0].clusters)
    cells: dict[str, list[Scored]] = {}
    for trial in trials:
        cells.setdefault(cell_of(trial.row, keys), []).append(trial)
    losses: dict[int, Array] = {}
    for cell in cells.values():
        fitted = cross_fitted([trial.finished for trial in cell], half)
        losses |= {id(trial): fit for trial, fit in zip(cell, fitted, strict=True)}
    return [replace(trial, losses=losses[id(trial)]) for trial in trials]


def _largest_set(scored: list[Scored], left_out: list[str], by_text: bool) -> list[Scored]:
    """Return the trials on the same tokens, or those on the same text if these are more."""
    on_tokens = Counter(trial.scored_on for trial in scored)
    on_text = Counter(trial.text for trial in scored if by_text and trial.text)
    chosen, most = next(iter(on_tokens.most_common(1)), (("", "", ""), 0))
    text, more = next(iter(on_text.most_common(1)), ("", 0))
    if more > most:
        left_out += [f"{t.label}: {_other_text(t)}" for t in scored if t.text != text]
        return in_bits([trial for trial in scored if trial.text == text])
    left_out += [f"{t.label}: {_difference(t, chosen)}" for t in scored if t.scored_on != chosen]
    return [trial for trial in scored if trial.scored_on == chosen]


def in_bits(trials: Sequence[Scored]) -> list[Scored]:
    """Return the same trials in bits per byte of text.

    Clusters of rows are found by tokens, so tokenizers may disagree on them. The coarsest
    clusters are used for all trials.
    """
    sizes = [np.ones(0) if trial.bytes is None else trial.bytes for trial in trials]
    tokens_a_byte = fmean(
        trial.tokens.sum() / size.sum() for trial, size in zip(trials, sizes, strict=True)
    )
    measure = Measure(BITS_PER_BYTE, METRICS[BITS_PER_BYTE].unit, tokens_a_byte / math.log(2))
    every = [trial.clusters for trial in trials]
    clusters = min(every, key=lambda ids: 0 if ids is None else len(np.unique(ids)))
    return [
        replace(
            trial.measured(measure, trial.losses / math.log(2), size, clusters),
            finished={value: nats / math.log(2) for value, nats in trial.finished.items()},
        )
        for trial, size in zip(trials, sizes, strict=True)
    ]


def _ended_badly(row: TrialRow) -> bool:
    if row.result is None:
        return False
    return row.result.state not in (State.DONE, State.PRUNED)


def _agrees(row: TrialRow, kept: Sequence[Scored], keys: Sequence[str]) -> bool:
    """Whether a trial without a score would stand among the trials that are compared."""
    if not kept:
        return False
    values = kept[0].row.swept
    return all(show(row.swept.get(key)) == show(values.get(key)) for key in keys)


def _one_a_seed(trials: list[Scored], left_out: list[str]) -> list[Scored]:
    """Drop trials with equal swept values and seed: they differ in something that no key shows."""
    looks = Counter(canonical_json(trial.row.swept) for trial in trials)
    kept = [trial for trial in trials if looks[canonical_json(trial.row.swept)] == 1]
    left_out += [
        f"{trial.label}: another trial has the same swept values and differs in something else, "
        "for example the file its rows come from"
        for trial in trials
        if looks[canonical_json(trial.row.swept)] > 1
    ]
    return kept


def _said_once(left_out: Sequence[str]) -> list[str]:
    """Return the reasons; trials left out because of one cluster of held-out rows share one."""
    reasons = Counter(text.partition(": ")[2] for text in left_out if NO_INTERVAL in text)
    several = [f"{count} trials: {why}" for why, count in reasons.items() if count > 1]
    alone = [text for text in left_out if reasons[text.partition(": ")[2]] < 2]
    return [*several, *alone]


def _one_cluster(row: TrialRow, groups: Any) -> str:
    """Say why held-out examples that all belong together give no interval, and what to type.

    Args:
        row: a trial that was scored on them.
        groups: the number of groups by `data.columns.group`; None in an older result.
    """
    column, split = (row.settings.get(f"data.columns.{key}") for key in ("group", "split"))
    reason, others, way = "have much the same answers", "with other answers", ""
    if column and groups in (1, None):
        reason, others = f"are of one group (data.columns.group={column})", "of other groups"
        way = ", or set data.columns.group='' if these rows do not belong together"
    if column and groups is None:
        reason += ", or have much the same answers"
    how = "raise data.eval_n to hold out rows"
    if own_set := next((k for k in OWN_SETS if row.settings.get(k)), ""):
        how = f"add to {own_set}={row.settings[own_set]} rows"
    elif split:
        how = f"in the column '{split}', mark as held out also rows"
    return f"all held-out examples {reason}, {NO_INTERVAL}; {how} {others}{way}"


def _scored(row: TrialRow) -> Scored | str:
    """Return the trial with its losses, or the reason why it cannot be compared."""
    label, result = label_of(row), row.result
    if row.outdated:
        return f"{label}: {row.outdated}"
    if row.tuned and not row.is_candidate:
        return f"{label}: {', '.join(row.tuned)} was not tuned for it, as it was for the others"
    if result is None:
        return f"{label}{ABSENT}" + (f" ({why})" if (why := row.trial.read_result()[1]) else "")
    if result.state is not State.DONE:
        # whole words: a setting that is cut in its middle would be another one
        error = shorten((result.error or {}).get("message", ""), 120, placeholder=" …")
        return f"{label}: {result.state}" + (f" ({error})" if error else "")
    losses = read_losses(row.evaluations.per_example_file)
    fingerprint = result.data.get("eval_fingerprint")
    if losses is None or not fingerprint:
        return f"{label}: the losses of its held-out examples are missing or damaged"
    if len(losses.nats) > 1 and len(np.unique(losses.clusters)) == 1:
        return f"{label}: {_one_cluster(row, result.data.get('eval_groups'))}"
    if len(losses.nats) == 1:
        return f"{label}: one held-out example gives no interval; set data.eval_n to 2 or more"
    base = f"{result.model.get('name')} {result.model.get('revision') or ''}".strip()
    return Scored(
        row,
        label,
        losses.nats,
        losses.tokens,
        base,
        str(fingerprint),
        row.settings,
        losses.clusters,
        losses.bytes,
    )


def _difference(trial: Scored, chosen: tuple[str, str, str]) -> str:
    base, fingerprint, _ = chosen
    if trial.base != base:
        return f"its base is {trial.base}, that of the comparison {base}"
    if trial.fingerprint != fingerprint:
        return (
            "it was scored on other held-out tokens or another mask "
            f"({trial.fingerprint}, not {fingerprint})"
        )
    return (
        "its rows became tokens by the rules of another version of this project, or the file of "
        "its held-out losses was changed"
    )


def _other_text(trial: Scored) -> str:
    if not trial.text:
        return (
            "the comparison is in bits per byte, and its result does not say on how many bytes it "
            "was scored; run it again in another study"
        )
    return "it was scored on other held-out text (another set, mask or length of answers)"


def label_of(row: TrialRow) -> str:
    """Return what the table calls a trial."""
    return words(row.swept) or row.trial.name
