"""What was tuned in a study: one trial stands for each setting and seed, the best candidate."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tinyllama_lab.config.axes import short_name, show
from tinyllama_lab.report.text import by_size
from tinyllama_lab.study.trial import State, Trial, contest_key

if TYPE_CHECKING:
    from tinyllama_lab.report.analysis.comparable import Scored
    from tinyllama_lab.report.table import Row

RATE = "train.lr"
# settings whose best learning rate may differ from value to value
NEEDS_OWN_RATE = (
    "lora.r",
    "lora.alpha",
    "lora.variant",
    "lora.targets",
    "quant.kind",
    "train.batch_size",
    "data.n",
)


def settled(
    rows: Sequence[Row], tuned: Mapping[str, Any], configs: Mapping[Trial, dict[str, Any]]
) -> list[Row]:
    """The rows, with the candidates marked that others of their contest beat.

    Args:
        rows: trials of one study.
        tuned: what `Study.read_tuned` returned.
        configs: the configuration of every trial.
    """
    if not tuned:
        return list(rows)
    keys = tuple(tuned["values"])
    candidates = frozenset(tuned["keys"])
    contests: dict[str, list[Row]] = {}
    for row in rows:
        if row.trial.key in candidates:
            contest = contest_key(configs[row.trial], keys)
            contests.setdefault(contest, []).append(row)
    beaten = {id(row) for contest in contests.values() for row in _beaten(contest)}
    return [
        replace(
            row,
            tuned=keys,
            is_candidate=row.trial.key in candidates,
            is_beaten=id(row) in beaten,
        )
        for row in rows
    ]


def _beaten(contest: Sequence[Row]) -> list[Row]:
    """All but the one that stands for the contest; while it is not over, those that ended."""
    ended = [row for row in contest if row.result is not None]
    if len(ended) < len(contest):
        return ended
    best = min(contest, key=lambda row: (_loss(row), _was_pruned(row)))
    return [row for row in contest if row is not best]


def _was_pruned(row: Row) -> bool:
    """Where none is done, one that failed stands for the contest: its setting has lost a run."""
    return row.result is not None and row.result.state is State.PRUNED


def _loss(row: Row) -> float:
    if row.result is None or row.result.state is not State.DONE:
        return math.inf
    loss = row.result.metrics.get("eval/loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def rate_clause(
    key: str, tuned: Collection[str], sides: Sequence[tuple[Any, Sequence[Any]]]
) -> str:
    """How the learning rate was chosen for a question about `key`; empty where nobody asks.

    Args:
        key: the setting that the question is about.
        tuned: the settings that were tuned.
        sides: each value of `key`, and the learning rates of its trials.
    """
    if key not in NEEDS_OWN_RATE:
        return ""
    rates = [sorted(set(found)) for _, found in sides]
    if RATE in tuned:
        told = "; ".join(
            f"{show(value)}: {_from_to(own)}" for (value, _), own in zip(sides, rates, strict=True)
        )
        return f"each at its own best learning rate ({told})"
    every = sorted({rate for own in rates for rate in own})
    if len(every) == 1:
        return f"both at learning rate {show(every[0])}, which was not tuned"
    return f"averaged over the learning rates {', '.join(map(show, every))}"


def untuned_words(trials: Sequence[Scored]) -> str:
    """What to add to a recommendation among settings that share one learning rate, or nothing."""
    rates = {trial.settings.get(RATE) for trial in trials}
    asked = [key for key in NEEDS_OWN_RATE if len({show(t.settings.get(key)) for t in trials}) > 1]
    if not asked or RATE in trials[0].row.tuned or len(rates) > 1:
        return ""
    return (
        f"all at learning rate {show(rates.pop())}, which was not tuned: with tune=train.lr the "
        "order may be another"
    )


def _from_to(values: Sequence[Any]) -> str:
    return show(values[0]) if len(values) == 1 else f"{show(values[0])} to {show(values[-1])}"


def setting_words(trials: Sequence[Row]) -> dict[str, Any]:
    """What names the setting that trials of several seeds share, by key.

    A tuned setting has the values that its seeds chose.
    """
    swept = trials[0].swept
    tuned = {key: {show(row.swept.get(key)) for row in trials} for key in trials[0].tuned}
    names: dict[str, Any] = {}
    for key, value in swept.items():
        if key == "seed":
            continue
        several = sorted(tuned.get(key, ()), key=by_size)
        names[key] = "/".join(several) if len(several) > 1 else value
    return names


def edge_notes(rows: Sequence[Row]) -> list[str]:
    """Where the best value lay at the end of the ladder: a better one may lie beyond."""
    candidates = [row for row in rows if row.is_candidate]
    chosen = [row for row in candidates if not row.is_beaten and row.result]
    notes = [*_lost_candidates(candidates)]
    for key in candidates[0].tuned if candidates else ():
        tried = sorted({row.settings[key] for row in candidates if _is_number(row.settings[key])})
        if len(tried) < 2:
            continue
        lower = [float(f"{tried[0] / 3:.2g}"), *tried]
        higher = [*tried, float(f"{tried[-1] * 3:.2g}")]
        for edge, way, wider in ((tried[0], "lowest", lower), (tried[-1], "highest", higher)):
            at = sum(row.settings[key] == edge for row in chosen)
            if at:
                notes.append(
                    f"in {at} of {len(chosen)} runs the best {short_name(key)} was the {way} that "
                    f"was tried, {show(edge)}: a better one may lie beyond; another study with "
                    f"tune_values=[{','.join(map(show, wider))}] would tell"
                )
    return notes


def _lost_candidates(candidates: Sequence[Row]) -> Iterator[str]:
    ended = (State.DONE, State.PRUNED)
    lost = sum(row.result is not None and row.result.state not in ended for row in candidates)
    if lost:
        yield (
            f"{lost} of {len(candidates)} candidates of the tuning failed: their settings were "
            "tuned over fewer values than the others"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
