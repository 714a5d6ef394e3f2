"""Notes that a reader needs before trusting the verdicts and the recommendation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tinyllama_lab.config.axes import setting_label, show
from tinyllama_lab.data.rows import LeftOut
from tinyllama_lab.metrics import BITS_PER_BYTE
from tinyllama_lab.report.analysis.comparison import ABSENT, Comparison, cell_of
from tinyllama_lab.report.analysis.contrasts import Contrast
from tinyllama_lab.report.analysis.example_losses import read_losses
from tinyllama_lab.report.analysis.luck import seed_spread
from tinyllama_lab.report.analysis.measure import NATS, between
from tinyllama_lab.report.analysis.ran_with import mixed
from tinyllama_lab.report.analysis.ranking import RankedCell
from tinyllama_lab.report.analysis.recommendation import MOST_NAMED
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.statistics import METHODS, Estimate, compare
from tinyllama_lab.report.analysis.text_scores import FEW
from tinyllama_lab.report.analysis.training_end import training_end
from tinyllama_lab.report.analysis.tuned import RATE
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.events import read_notes
from tinyllama_lab.study.trial import State

_LEAST_GAIN = 0.0001  # nats a token; a smaller one, or a loss, is not told as a number
_MOST_NOTES = 8  # of workers
LOST_SHARE = 0.1  # of the rows; if more are left out or cut, a note says so


def caveats(
    comparison: Comparison,
    effects: Sequence[Contrast],
    cells: Sequence[RankedCell],
) -> list[str]:
    """Return the notes on what limits the verdicts and the recommendation.

    Args:
        comparison: the trials that are compared.
        effects: the main effects.
        cells: the settings; where none is chosen, no recommendation is given.
    """
    notes = [*not_compared(comparison), *_other_tokens(comparison)]
    if any(cell.is_chosen for cell in cells):
        notes += [*_forgetting(cells), *_chosen(comparison), *_at_the_edge(comparison, cells)]
        notes += training_end(cells)
    notes += [*_chosen_steps(comparison), *comparison.tuning]
    # without two values to compare there are no effects, and the cells tell the number of seeds
    seeds = {effect.seeds for effect in effects} or {
        len(cell) for cell in comparison.whole_cells()
    }
    if 1 in seeds:
        notes.append(
            f"one seed: the intervals take the luck of a training run as given, "
            f"{seed_spread(comparison).sentence}; add seeds=3"
        )
    if 2 in seeds:
        notes.append("two seeds say little about how much seeds differ; three or more are better")
    notes += [*_one_subset(comparison, effects), *_mixed_origins(comparison, effects)]
    return [*notes, *_lost_data(comparison)]


def method_notes(
    comparison: Comparison, effects: Sequence[Contrast], settings: Settings
) -> list[str]:
    """Return notes on how the numbers were made, for readers who want to check them."""
    notes, measure = [], comparison.measure
    if effects:
        least = f"{measure.margin(settings.margin):g} {measure.unit}"
        notes.append(
            f"the margin ({least}) decides what is equivalent and what is recommended, not what "
            "is better or worse"
        )
    if len(effects) > 1:
        notes.append(
            f"verdicts are corrected for {len(effects)} comparisons "
            f"({METHODS[settings.correction]}), the 95 % intervals are not"
        )
    notes += [*_shared_costs(comparison), *_few_generations(comparison)]
    return [*notes, *_of_workers(comparison)]


def _of_workers(comparison: Comparison) -> Iterator[str]:
    """Yield what the workers noted while they trained, with the number of trials that it is on."""
    found = Counter(
        text
        for trial in comparison.trials
        for text in dict.fromkeys(read_notes(trial.row.trial.events_file))
    )
    trials = len(comparison.trials)
    for text, count in found.most_common(_MOST_NOTES):
        yield f"{text} ({'all' if count == trials else count} of {counted(trials, 'trial')})"
    if len(found) > _MOST_NOTES:
        yield f"events.jsonl of the trials holds {len(found) - _MOST_NOTES} more notes of workers"


def _other_tokens(comparison: Comparison) -> Iterator[str]:
    if not comparison.measure.is_per_token:
        yield (
            "the trials have different tokens for the same held-out text, so they are compared in "
            f"bits per byte of that text ({BITS_PER_BYTE}), not in nats per token"
        )


def _chosen_steps(comparison: Comparison) -> Iterator[str]:
    """Yield by how much losses are too low because held-out rows have chosen a step."""
    gains = [trial.metric("heldout/optimism") for trial in comparison.trials]
    known = [gain for gain in gains if gain is not None]
    if known:
        gain = float(np.mean(known))
        amount = f"about {gain:.4f}" if gain >= _LEAST_GAIN else f"less than {_LEAST_GAIN:g}"
        yield (
            "train.keep=best chose steps on the rows that are scored, which makes a loss look "
            f"better by {amount} nats a token (cross-validated over rows; "
            f"{counted(len(known), 'trial')}); confirmation is not affected"
        )


def _forgetting(cells: Sequence[RankedCell]) -> Iterator[str]:
    """Yield a sentence on the settings, the chosen one first; none if `eval.general` was off."""
    ordered = sorted(cells, key=lambda cell: not cell.is_chosen)
    known = [(cell, lost) for cell in ordered if (lost := _general_difference(cell))]
    if not known:
        return
    losses = [
        f"{cell.beside(ordered[0])}: {NATS.change(lost.difference)} ({between(*lost.interval())})"
        for cell, lost in known[:MOST_NAMED]
    ]
    runs = "" if known[0][1].seeds > 1 else " over other passages, not over other runs"
    more = f"; and {len(known) - MOST_NAMED} more settings" if len(known) > MOST_NAMED else ""
    yield (
        f"on unrelated text, against the base (95 % interval{runs} in brackets): "
        f"{'; '.join(losses)}{more}"
    )


def _general_difference(cell: RankedCell) -> Estimate | None:
    """Estimate the loss of a setting minus that of its base on unrelated text, by passage.

    Above zero, the setting has forgotten something. None without the losses of both.
    """
    differences, tokens = [], None
    for trial in cell.trials:
        base = trial.row.base
        ours = read_losses(trial.row.evaluations.general_file)
        theirs = read_losses(base.general_file) if base else None
        # other token counts mean another tokenizer or cut, and losses that cannot be paired
        if ours is None or theirs is None or ours.tokens.tolist() != theirs.tokens.tolist():
            return None
        differences.append(ours.nats - theirs.nats)
        tokens = ours.tokens
    if tokens is None or len(tokens) < 2:
        return None
    return compare(np.stack(differences), tokens)


def _lost_data(comparison: Comparison) -> Iterator[str]:
    """Yield notes on the trial that lost most rows, if more than a tenth was left out or cut."""
    notes: dict[str, tuple[float, str]] = {}
    for data in (trial.row.result.data for trial in comparison.trials if trial.row.result):
        dropped = data.get("dropped")
        left_out = LeftOut.of(dropped if isinstance(dropped, dict) else None)
        used = _count(data, "train_rows") + _count(data, "eval_rows")
        unusable = _count(data, "unusable_rows")  # found only after tokenizing
        cut = _count(data, "cut_rows") + _count(data, "eval_cut_rows")
        gone, rows = left_out.counts.total() - unusable, _count(data, "rows")
        for kind, count, total, text in (
            ("gone", gone, rows, left_out.sentence(rows)),
            ("unusable", unusable, used + unusable, left_out.sentence(rows)),
            ("cut", cut, used, f"{cut} of {used} answers are cut, and do not end"),
        ):
            # trials lose different rows (another data.max_length): of each kind, the worst counts
            if (
                total
                and count > LOST_SHARE * total
                and count / total > notes.get(kind, (0.0, ""))[0]
            ):
                notes[kind] = (count / total, text)
    yield from dict.fromkeys(text for _, text in notes.values())  # in order, each once


def _count(data: dict[str, Any], name: str) -> int:
    value = data.get(name)
    return value if isinstance(value, int) else 0


def _at_the_edge(comparison: Comparison, cells: Sequence[RankedCell]) -> Iterator[str]:
    """Yield a note where the best value lies at the end of its range, which may be too short."""
    for chosen in (cell for cell in cells if cell.is_chosen):
        swept = chosen.trials[0].row.swept
        for end, word, other in ((max, "largest", "larger"), (min, "smallest", "smaller")):
            keys = [key for key in comparison.keys if _is_open(key, word)]
            at = [
                k
                for k in keys
                if (numbers := _numbers(comparison, k)) and swept[k] == end(numbers)
            ]
            if at:
                values = ", ".join(setting_label(key, swept[key]) for key in at)
                verb = f"is the {word} that was" if len(at) == 1 else f"are the {word} that were"
                yield f"{values} {verb} tried: {other} was not tested"


def _is_open(key: str, end: str) -> bool:
    """Whether a model may be better beyond that end; a smaller rank is cheaper, never better."""
    return key == RATE if end == "smallest" else not key.startswith("eval.")


def _numbers(comparison: Comparison, key: str) -> list[float]:
    """Return all values that were tried, scored or not; empty unless they are distinct numbers."""
    values = comparison.tried[key]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return numbers if len(numbers) == len(values) and len(set(numbers)) > 1 else []


def _mixed_origins(comparison: Comparison, effects: Sequence[Contrast]) -> Iterator[str]:
    """Yield notes on trials that differ in code, libraries, precision or machine."""
    if any(effect.environments.always for effect in effects):
        yield (
            "where the two sides of a comparison ran with other code, libraries, precision or "
            "machines, a part of the difference may come from that: run both with the same"
        )
    for two in dict.fromkeys(two for effect in effects for two in effect.environments.sometimes):
        questions = [effect.question for effect in effects if two in effect.environments.sometimes]
        which = "; ".join(questions) if len(questions) < len(effects) else "every comparison"
        kind, values = two
        yield (
            f"{which}: some pairs did not run with the same {kind} ({values}), so a part of what "
            "differs, above all time and speed, may come from that"
        )
    reported = {kind for effect in effects for kind in effect.environments.kinds}
    for kind, values in mixed(comparison.trials):
        if kind not in reported:
            yield f"the trials did not all run with the same {kind}: {values}"


def _one_subset(comparison: Comparison, effects: Sequence[Contrast]) -> Iterator[str]:
    """Yield a note that all seeds trained on the same rows, where numbers of rows are compared."""
    asks_for_rows = any(effect.key == "data.n" for effect in effects)
    if asks_for_rows and any(t.settings.get("data.subset") != "seed" for t in comparison.trials):
        yield (
            "training rows: every seed took the same nested subsets, so the verdict is about "
            "these rows; data.subset=seed draws others for each seed"
        )


def _shared_costs(comparison: Comparison) -> Iterator[str]:
    most = max((t.environment.get("adapters_at_once") or 1 for t in comparison.trials), default=1)
    if most > 1:
        yield (
            f"up to {most} trials trained together, so what a setting costs is counted and not "
            "measured: the FLOPs of its tokens, and the memory that one trial alone would take"
        )


def _few_generations(comparison: Comparison) -> Iterator[str]:
    """Yield a note if a trial generated too few completions to rank settings by."""
    generations = "eval.generations"
    limits = {
        generations: [n for trial in comparison.trials if (n := trial.settings.get(generations))],
        "data.eval_n": [len(trial.losses) for trial in comparison.trials],
    }
    few = {key: min(counts) for key, counts in limits.items() if counts and min(counts) < FEW}
    if limits[generations] and few:
        yield (
            f"metrics of generated text rest on {min(few.values())} completions a trial, too few "
            f"to rank settings by: set {' and '.join(f'{key}={FEW}' for key in few)} or more"
        )


def _chosen(comparison: Comparison) -> Iterator[str]:
    """Yield notes on which settings and seeds the recommendation rests."""
    cells, whole = comparison.cells(), comparison.whole_cells()
    lost = {cell_of(row, comparison.keys) for row in comparison.lost} & cells.keys()
    if lost and len(lost) < len(cells):
        count = "1 setting" if len(lost) == 1 else f"{len(lost)} settings"
        yield f"{count} lost a run that failed, and cannot be recommended by its other runs"
    kept = [cell for name, cell in cells.items() if name not in lost] or list(cells.values())
    if len(whole) < len(kept):
        other = len(kept) - len(whole)
        yield f"not recommended, because run on other seeds: {other} of {len(kept)} settings"
    if any(len(cell) > len(whole[0]) for cell in kept):
        seeds = ", ".join(sorted(show(trial.seed) for trial in whole[0]))
        yield f"recommended on seed {seeds} alone: not every setting was run with the others"
    if pruned := len(_pruned(comparison)):
        yield (
            f"the best of {len(whole) + pruned} settings was chosen by these held-out rows; the "
            f"shrunken estimate knows nothing of the {pruned} that were pruned"
        )


def _pruned(comparison: Comparison) -> list[str]:
    return [text for text in comparison.left_out if f": {State.PRUNED}" in text]


def not_compared(comparison: Comparison) -> list[str]:
    """Return notes on how many trials are left out of the comparison, and why."""
    pruned = _pruned(comparison)
    absent = [text for text in comparison.left_out if text.endswith(ABSENT)]
    others = [text for text in comparison.left_out if text not in pruned and text not in absent]
    notes = [f"not compared: {counted(len(pruned), 'trial')}, pruned"] if pruned else []
    if absent:
        notes.append(f"not compared: {counted(len(absent), 'trial')} without a result yet")
    if others:
        some = "; ".join(others[:3])
        more = f"; and {len(others) - 3} more" if len(others) > 3 else ""
        notes.append(f"not compared: {some}{more}")
    return notes
