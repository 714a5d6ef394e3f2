"""Which trials may stand in one comparison, and why the others may not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
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
OWN_SETS = ("data.eval_path", "data.eval_split")  # with held-out rows of their own
ABSENT = ": no result"  # how the reason of a trial ends that has not ended itself


@dataclass(frozen=True, eq=False)
class Scored:
    """A trial that is done, with the loss of every held-out example.

    One that stands for a tuned setting has cross-fitted losses; see `cross_fit`.
    """

    row: TrialRow
    label: str
    losses: Array  # [examples] summed over the label tokens, nats (or as `measure` says)
    tokens: Array  # [examples] label tokens (or bytes): what the sum is divided by
    base: str  # the model and its revision
    fingerprint: str  # of the held-out tokens and the mask
    settings: dict[str, Any]  # every key of its configuration, flat
    clusters: Ids | None = None  # [examples] equal for those that belong together
    bytes: Array | None = None  # [examples] of the supervised text, UTF-8
    measure: Measure = NATS
    # the losses of all candidates of its contest that finished, by value; see `TrialRow.contest`
    finished: Mapping[str, Array] = field(default_factory=dict)

    @property
    def own_losses(self) -> Array:
        """The losses of this trial itself, `[examples]`."""
        return self.finished.get(self.row.tuned_value, self.losses)

    @property
    def optimism(self) -> float:
        """By how much its own mean loss is below the cross-fitted one, which chose it."""
        return float((self.losses - self.own_losses).sum() / self.tokens.sum())

    @property
    def seed(self) -> Any:
        """Of its training run."""
        return self.settings.get(SEED)

    @property
    def loss(self) -> float:
        """Mean loss in the unit of `measure`."""
        return float(self.losses.sum() / self.tokens.sum())

    @property
    def scored_on(self) -> tuple[str, str, str]:
        """Equal for trials that may be compared: base, fingerprint, and a check.

        The check is the number of tokens of every example, and the version of the rules by which
        rows became tokens.
        """
        rendering = self.settings.get("data.rendering")
        return self.base, self.fingerprint, digest([self.tokens.tolist(), rendering])

    @property
    def text(self) -> str:
        """Equal for trials that were scored on the same text, whatever its tokens; else empty."""
        facts = self.row.result.data if self.row.result else {}
        fingerprint = facts.get("eval_text_fingerprint")
        if not fingerprint or self.bytes is None:
            return ""
        return digest([fingerprint, self.bytes.tolist()])

    @property
    def environment(self) -> dict[str, Any]:
        """Code, machine and precision that it ran with."""
        return self.row.result.environment if self.row.result else {}

    @property
    def is_packed(self) -> bool:
        """Whether others trained beside it, so that its time and memory are not its own."""
        return (self.environment.get("adapters_at_once") or 1) > 1

    def measured(
        self, measure: Measure, losses: Array, tokens: Array, clusters: Ids | None
    ) -> Scored:
        """The same trial in another measure."""
        return replace(
            self, measure=measure, losses=losses, tokens=tokens, clusters=clusters, finished={}
        )

    def metric(self, name: str) -> float | None:
        """A number of its result; None where it is missing, NaN or infinite."""
        return self.row.metric(name)


@dataclass(frozen=True, eq=False)
class Comparable:
    """Trials scored on the same held-out tokens, or on the same text, and why others are not."""

    trials: list[Scored]
    keys: list[str]  # swept, without the seed
    left_out: list[str]
    lost: list[TrialRow] = field(default_factory=list)  # failed, diverged, or out of memory
    tried: dict[str, list[Any]] = field(default_factory=dict)  # by key, scored or not
    tuning: list[str] = field(default_factory=list)  # what the tuning leaves open

    @property
    def measure(self) -> Measure:
        """What their losses are given in."""
        return self.trials[0].measure if self.trials else NATS

    def cells(self) -> dict[str, list[Scored]]:
        """Trials that differ in nothing but their seed."""
        cells: dict[str, list[Scored]] = {}
        for trial in self.trials:
            cells.setdefault(cell_of(trial.row, self.keys), []).append(trial)
        return cells

    def whole_cells(self) -> list[list[Scored]]:
        """Cells that lost no run, where there are some, on the seeds that all or most have.

        One whose bad runs failed must not win by the others.
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
    """Of the loss of ours minus theirs, seed by seed and example by example."""
    pairs = zip(ours, theirs, strict=True)
    differences = np.stack([one.losses - other.losses for one, other in pairs])
    return compare(differences, ours[0].tokens, luck, ours[0].clusters)


def cell_of(row: TrialRow, keys: Sequence[str], without: str = "") -> str:
    """What two trials share that differ in nothing but their seed, and the key `without`."""
    return canonical_json({key: row.swept.get(key) for key in keys if key != without})


def shared_seeds(sets: Sequence[frozenset[Any]]) -> frozenset[Any]:
    """The set of seeds with which most runs can be used, every cell on the same."""
    different = sorted({own for own in sets if own}, key=lambda own: sorted(map(str, own)))
    return max(
        different,
        key=lambda some: len(some) * sum(some <= own for own in sets),
        default=frozenset(),
    )


def comparable(rows: Sequence[TrialRow], by_text: bool = True) -> Comparable:
    """The largest set of trials that may be compared; the best is never found across sets.

    Those are trials of one base on the same tokens or, with `by_text`, of any on the same text.
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
    keys = [key for key in keys if key not in tuned]
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
    return Comparable(kept, swept, _said_once(left_out), lost, tried, tuning)


def _with_finished(trial: Scored, beaten: Sequence[TrialRow]) -> Scored:
    """The trial with the losses of the candidates that it beat, on the same held-out tokens."""
    if not trial.row.is_candidate:
        return trial
    others = [_scored(row) for row in beaten if row.contest == trial.row.contest]
    every = [trial, *(other for other in others if isinstance(other, Scored))]
    finished = {t.row.tuned_value: t.losses for t in every if t.scored_on == trial.scored_on}
    return replace(trial, finished=finished)


def _cross_fitted(trials: list[Scored], keys: Sequence[str]) -> list[Scored]:
    """The trials; those of a tuned setting with losses that had no part in choosing its value."""
    half = first_half(trials[0].tokens, trials[0].clusters)
    cells: dict[str, list[Scored]] = {}
    for trial in trials:
        cells.setdefault(cell_of(trial.row, keys), []).append(trial)
    losses: dict[int, Array] = {}
    for cell in cells.values():
        fitted = cross_fitted([trial.finished for trial in cell], half)
        losses |= {
            id(trial): trial_losses for trial, trial_losses in zip(cell, fitted, strict=True)
        }
    return [replace(trial, losses=losses[id(trial)]) for trial in trials]


def _largest_set(scored: list[Scored], left_out: list[str], by_text: bool) -> list[Scored]:
    """Trials on the same tokens; or on the same text, where these are more."""
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
    """The same trials in bits per byte of text.

    Which rows belong together is told by tokens: the tokenizer that unites most is believed.
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
    """Whether a trial without a score would stand among those that are compared."""
    if not kept:
        return False
    values = kept[0].row.swept
    return all(show(row.swept.get(key)) == show(values.get(key)) for key in keys)


def _one_a_seed(trials: list[Scored], left_out: list[str]) -> list[Scored]:
    """Without trials that look alike but are not: they differ in what no swept key shows."""
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
    """The reasons; why held-out rows give no interval is said once for all trials."""
    reasons = Counter(text.partition(": ")[2] for text in left_out if NO_INTERVAL in text)
    several = [f"{count} trials: {why}" for why, count in reasons.items() if count > 1]
    alone = [text for text in left_out if reasons[text.partition(": ")[2]] < 2]
    return [*several, *alone]


def _one_cluster(row: TrialRow, groups: Any) -> str:
    """Why held-out examples that all belong together give no interval, and what helps.

    Args:
        groups: how many `data.columns.group` makes of them; None where an older result has none.
    """
    column, split = (row.settings.get(f"data.columns.{key}") for key in ("group", "split"))
    what, others, way = "have much the same answers", "with other answers", ""
    if column and groups in (1, None):
        what, others = f"are of one group (data.columns.group={column})", "of other groups"
        way = ", or set data.columns.group='' if these rows do not belong together"
    if column and groups is None:
        what += ", or have much the same answers"
    how = "raise data.eval_n to hold out rows"
    if own := next((k for k in OWN_SETS if row.settings.get(k)), ""):
        how = f"add to {own}={row.settings[own]} rows"
    elif split:
        how = f"in the column '{split}', mark as held out also rows"
    return f"all held-out examples {what}, {NO_INTERVAL}; {how} {others}{way}"


def _scored(row: TrialRow) -> Scored | str:
    """The trial, or why it cannot be compared."""
    label, result = label_of(row), row.result
    if row.outdated:
        return f"{label}: {row.outdated}"
    if row.tuned and not row.is_candidate:
        return f"{label}: {', '.join(row.tuned)} was not tuned for it, as it was for the others"
    if result is None:
        return f"{label}{ABSENT}" + (f" ({why})" if (why := row.trial.read_result()[1]) else "")
    if result.state is not State.DONE:
        error = (result.error or {}).get("message", "")
        return f"{label}: {result.state}" + (f" ({error[:120]})" if error else "")
    losses = read_losses(row.scores.per_example_file)
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
    """What the table calls a trial."""
    return words(row.swept) or row.trial.name
