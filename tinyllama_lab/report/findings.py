"""What the studies here measured for a published claim, and whether the two may be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from tinyllama_lab.config.axes import show
from tinyllama_lab.metrics import HELDOUT_LOSS
from tinyllama_lab.report.analysis.analysis import analyse
from tinyllama_lab.report.analysis.comparable import Comparable, Scored
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.statistics import Array, Estimate, compare
from tinyllama_lab.study.trial import canonical_json

_EVERY_PAIR = Settings(pairs="all")
NOT_MEASURED = "not measured here"
_OTHER_ROWS = "yes, but for the held-out rows"  # nobody published theirs


@dataclass(frozen=True)
class Finding:
    """What was measured for a claim; `differs` says why the two may not be compared."""

    measured: str = NOT_MEASURED
    interval: str = ""
    differs: str = ""


@dataclass(frozen=True)
class Claim:
    """What a project says of itself, and how it is looked up here."""

    project: str
    text: str
    settings: Mapping[str, Any]  # of the trials that could show it
    hardware: str  # that it was measured on, in a word; empty where it does not matter
    find: Callable[[Sequence[Comparable], Claim], Finding]


def metric(name: str, pattern: str = "{:.4f}") -> Callable[[Sequence[Comparable], Claim], Finding]:
    """A number of the trials with the claim's settings; the mean over seeds."""

    def find(studies: Sequence[Comparable], claim: Claim) -> Finding:
        matching = [t for t in _all(studies) if _differences(t, claim.settings) == []]
        trials = list({trial.row.trial.key: trial for trial in matching}.values())
        if name.startswith("base/"):  # one evaluation, copied into every trial
            trials = list({(t.base, t.fingerprint, t.metric(name)): t for t in trials}.values())
        values = [value for t in trials if (value := t.metric(name)) is not None]
        if not values:
            return Finding()
        several = not name.startswith("base/") and len({_setting(trial) for trial in trials}) > 1
        if several and min(values) != max(values):
            span = f"{pattern.format(min(values))} to {pattern.format(max(values))}"
            return Finding(span, "", f"no: {len(trials)} trials of several settings match")
        return Finding(
            pattern.format(fmean(values)),
            _interval(name, trials, values, pattern),
            _hardware(trials, claim) or (_OTHER_ROWS if name[:5] in ("eval/", "base/") else ""),
        )

    return find


def _interval(name: str, trials: Sequence[Scored], values: Sequence[float], pattern: str) -> str:
    """Over examples for a loss, else over seeds."""
    if name == HELDOUT_LOSS and len({trial.fingerprint for trial in trials}) == 1:
        losses = np.stack([trial.losses for trial in trials])
        low, high = compare(losses, trials[0].tokens, clusters=trials[0].clusters).interval()
    elif len(values) > 1:
        reach = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
        low, high = fmean(values) - reach, fmean(values) + reach
    else:
        return "one trial"
    return f"{pattern.format(low)} to {pattern.format(high)}"


def effect(key: str, first: Any, second: Any) -> Callable[[Sequence[Comparable], Claim], Finding]:
    """The difference that a key makes, in the study nearest to the claim's settings."""

    def find(studies: Sequence[Comparable], claim: Claim) -> Finding:
        shown_pair = {show(first), show(second)}
        best: tuple[int, Finding] | None = None
        for study in studies:
            for each in analyse(study, _EVERY_PAIR).effects:
                if each.key != key or {show(each.first), show(each.second)} != shown_pair:
                    continue
                differs = _differences(study.trials[0], claim.settings)
                finding = _as_finding(each.estimate, each.verdict, differs)
                if best is None or len(differs) < best[0]:
                    best = (len(differs), finding)
        return best[1] if best else Finding()

    return find


def sensitivity(studies: Sequence[Comparable], claim: Claim) -> Finding:
    """How much more the loss of nf4 changes from the lowest to the highest learning rate."""
    best: tuple[int, Finding] | None = None
    for study in studies:
        corners: dict[tuple[Any, Any], dict[Any, Scored]] = {}
        if set(study.keys) != {"quant.kind", "train.lr"}:
            continue  # another swept key would mix its own effect into the four corners
        for trial in study.trials:
            corner = (trial.settings.get("quant.kind"), trial.settings.get("train.lr"))
            corners.setdefault(corner, {})[trial.settings.get("seed")] = trial
        rates = sorted({rate for _, rate in corners})
        if len(rates) < 2:
            continue
        wanted = [
            corners.get(pair, {}) for pair in product(("none", "nf4"), (rates[0], rates[-1]))
        ]
        seeds = sorted(set.intersection(*(set(corner) for corner in wanted)))
        if not seeds:
            continue
        low, high, low4, high4 = (np.stack([c[s].losses for s in seeds]) for c in wanted)
        estimate = compare((high4 - low4) - (high - low), study.trials[0].tokens)
        differs = _differences(study.trials[0], claim.settings)
        each = [_mean(part, study) for part in (high - low, high4 - low4)]
        verdict = f"lr {rates[0]:g} to {rates[-1]:g}: none {each[0]:+.4f}, nf4 {each[1]:+.4f}"
        if best is None or len(differs) < best[0]:
            best = (len(differs), _as_finding(estimate, verdict, differs))
    return best[1] if best else Finding()


def _mean(differences: Array, study: Comparable) -> float:
    return float(differences.mean(axis=0).sum() / study.trials[0].tokens.sum())


def _as_finding(estimate: Estimate, verdict: str, differs: Sequence[str]) -> Finding:
    low, high = estimate.interval()
    words = f"no: {', '.join(differs)}" if differs else ""
    return Finding(
        f"{estimate.difference:+.4f} nats ({verdict})", f"{low:+.4f} to {high:+.4f}", words
    )


def _setting(trial: Scored) -> str:
    """Equal for trials that differ in nothing but their seed."""
    return canonical_json({k: v for k, v in trial.settings.items() if k != "seed"})


def _all(studies: Iterable[Comparable]) -> list[Scored]:
    return [trial for study in studies for trial in study.trials]


def _differences(trial: Scored, wanted: Mapping[str, Any]) -> list[str]:
    """In what a trial is not as the claim's."""
    return [
        f"{key}={show(trial.settings.get(key))}, not {show(value)}"
        for key, value in wanted.items()
        if show(trial.settings.get(key)) != show(value)
    ]


def _hardware(trials: Sequence[Scored], claim: Claim) -> str:
    names = {str(t.row.result.environment.get("hardware")) for t in trials if t.row.result}
    if claim.hardware and not all(claim.hardware in name for name in names):
        return f"no: on {', '.join(sorted(names))}, not {claim.hardware}"
    return ""
