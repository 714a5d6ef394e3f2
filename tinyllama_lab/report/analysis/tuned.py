"""What a study tuned: the best candidate represents each setting and seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from tinyllama_lab.config.axes import short_name, show
from tinyllama_lab.metrics import HELDOUT_LOSS
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.study.trial import State

RATE = "train.lr"
# settings that shift the best learning rate: compared at one shared rate, some are favoured
NEEDS_OWN_RATE = (
    "model.name",
    "lora.r",
    "lora.alpha",
    "lora.variant",
    "lora.init",
    "lora.targets",
    "lora.layers",
    "lora.bias",
    "lora.modules_to_save",
    "quant.kind",
    "train.optimizer",
    "train.loraplus_ratio",
    "train.batch_size",
    "train.epochs",
    "train.max_steps",
    "data.n",
)
_RANKS = "lora.rank_pattern."  # one key for each name


def rate_clause(
    key: str, tuned: Collection[str], sides: Sequence[tuple[Any, Mapping[Any, Sequence[float]]]]
) -> str:
    """Say how the learning rate was chosen for a question about `key`; empty if irrelevant.

    Args:
        key: the setting that the question is about.
        tuned: the settings that were tuned.
        sides: each value of `key`, and the losses of its trials by learning rate.
    """
    if key == RATE:
        return ""
    rates = [sorted(losses) for _, losses in sides]
    every = sorted({rate for side_rates in rates for rate in side_rates})
    if RATE not in tuned and len(every) > 1:
        return _averaged(every, [losses for _, losses in sides])
    if not _needs_own_rate(key):
        return ""
    if RATE in tuned:
        rates_by_value = "; ".join(
            f"{show(value)}: {_from_to(side_rates)}"
            for (value, _), side_rates in zip(sides, rates, strict=True)
        )
        return f"each at the best of the learning rates that were tried ({rates_by_value})"
    return f"both at learning rate {show(every[0])}, which was not tuned"


def _averaged(rates: Sequence[Any], sides: Sequence[Mapping[Any, Sequence[float]]]) -> str:
    """Say that the effect is an average over learning rates, with the mean loss at each."""
    means = [fmean(loss for side in sides for loss in side.get(rate, ())) for rate in rates]
    return (
        f"averaged over the learning rates {', '.join(map(show, rates))} (mean losses "
        f"{', '.join(f'{mean:.3f}' for mean in means)}), not each at its own best"
    )


def untuned_sentence(rows: Sequence[TrialRow]) -> str:
    """Return a warning if the settings share one untuned learning rate; empty otherwise."""
    rates = {row.settings.get(RATE) for row in rows}
    keys = {key for row in rows for key in row.settings if _needs_own_rate(key)}
    differing = [key for key in keys if len({show(row.settings.get(key)) for row in rows}) > 1]
    if not differing or RATE in rows[0].tuned or len(rates) > 1:
        return ""
    return (
        f"All ran at learning rate {show(rates.pop())}, which was not tuned: with tune=train.lr "
        "the order may be another."
    )


def _needs_own_rate(key: str) -> bool:
    return key in NEEDS_OWN_RATE or key.startswith(_RANKS)


def _from_to(values: Sequence[Any]) -> str:
    return show(values[0]) if len(values) == 1 else f"{show(values[0])} to {show(values[-1])}"


def setting_words(trials: Sequence[TrialRow]) -> dict[str, Any]:
    """Return the swept values that name the setting of these trials, by key.

    Args:
        trials: of one setting, a seed each.
    """
    return {key: value for key, value in typical(trials).swept.items() if key != "seed"}


def typical(trials: Sequence[TrialRow]) -> TrialRow:
    """Return the trial that stands for a setting: of the tuned value that most of its seeds have.

    All seeds choose one value, but where it was ended early, another one stands for that seed. If
    several values are as frequent, the lowest loss decides.

    Args:
        trials: of one setting, a seed each.
    """
    counts = Counter(row.tuned_value for row in trials)
    infinite = float("inf")

    def rank(row: TrialRow) -> tuple[int, float]:
        loss = row.metric(HELDOUT_LOSS)
        return -counts[row.tuned_value], infinite if loss is None else loss

    return min(trials, key=rank)


def cross_fit_note(keys: Sequence[str], seeds: int) -> str:
    """Say how the losses of tuned settings were made, and what luck the choice leaves in them.

    Args:
        keys: the tuned settings.
        seeds: the number of seeds in the study.
    """
    names = ", ".join(map(short_name, keys))
    by_others = " and by other seeds" if seeds > 1 else ""
    text = (
        f"the losses of settings are cross-fitted: {names} was chosen on other held-out rows"
        f"{by_others} than those that it is scored on, so a loss may differ from the mean of the "
        "table"
    )
    if seeds > 1:
        return text
    return f"{text}; with one seed, a setting with more good values of {names} still looks better"


def edge_notes(rows: Sequence[TrialRow]) -> list[str]:
    """Note where the lowest or highest value was the best: a better one may lie beyond."""
    candidates = [row for row in rows if row.is_candidate]
    chosen = [row for row in candidates if not row.is_beaten and row.result]
    notes = [*_lost_candidates(candidates)]
    for key in candidates[0].tuned if candidates else ():
        tried = sorted({row.settings[key] for row in candidates if _is_number(row.settings[key])})
        if len(tried) < 2:
            continue
        # a factor of 3, as between the default values of a tuned learning rate
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


def _lost_candidates(candidates: Sequence[TrialRow]) -> Iterator[str]:
    ended = (State.DONE, State.PRUNED)
    lost = sum(row.result is not None and row.result.state not in ended for row in candidates)
    if lost:
        yield (
            f"{lost} of {len(candidates)} candidates of the tuning failed: their settings were "
            "tuned over fewer values than the others"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
