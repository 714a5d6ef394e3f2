"""Published numbers of five small projects, compared with the studies in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats

from tinyllama_lab.config.axes import show
from tinyllama_lab.errors import StudyError, shown
from tinyllama_lab.metrics import HELDOUT_LOSS, METRICS, PERPLEXITY
from tinyllama_lab.report.analysis.analysis import Analysis
from tinyllama_lab.report.analysis.comparison import Comparison, Scored
from tinyllama_lab.report.analysis.contrasts import matches, mean_estimate, values_of
from tinyllama_lab.report.analysis.settings import ALL_PAIRS, Settings
from tinyllama_lab.report.analysis.statistics import compare
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.analysis.tuned import RATE
from tinyllama_lab.study.study import StudyFolder, study_names
from tinyllama_lab.study.trial import canonical_json

_V01 = {"model.name": "tinyllama_v01", "data.name": "bitext_travel", "quant.kind": "nf4"}
_ALPACA = {
    "model.name": "tinyllama",
    "data.name": "alpaca",
    "data.n": 1000,
    "data.mask": "response",
    "lora.r": 8,
    "lora.targets": "attention",
    "train.max_steps": 500,
}
_DOLLY = {"model.name": "tinyllama", "data.name": "dolly"}
_R3_BASE = {**_DOLLY, "data.mask": "all", "data.style": "instruction_response"}
_R3 = {**_R3_BASE, "lora.targets": "attention_qv", "train.epochs": 3, "quant.kind": "none"}
_QUALITY = {  # as published: before and after training
    "bleu": (5.41, 5.62),
    "rouge1": (0.2553, 0.2309),
    "rouge2": (0.1033, 0.0912),
    "rougeL": (0.1975, 0.1771),
}
_QUANT = "quant.kind"
EVERY_PAIR = Settings(pairs=ALL_PAIRS)
NOT_MEASURED = "not measured here"
_OTHER_ROWS = "yes, but for the held-out rows"  # no project published its own


@dataclass(frozen=True)
class Measured:
    """What was measured for a claim; `differs` says why it may not be compared with the claim."""

    value: str = NOT_MEASURED
    interval: str = ""
    differs: str = ""


@dataclass(frozen=True)
class Claim:
    """A number that a project published, and the function that looks it up in the studies here."""

    project: str
    text: str
    settings: Mapping[str, Any]  # settings that a trial must have to be compared with it
    hardware: str  # part of the hardware name; empty where it does not matter
    find: Callable[[Sequence[Analysis], Claim], Measured]


def metric(name: str, pattern: str = "{:.4f}") -> Callable[[Sequence[Analysis], Claim], Measured]:
    """Return a lookup of a metric: its mean over all trials that have the claim's settings.

    Where some of these trials belong to a tuned study, only those count.

    Args:
        name: of the metric.
        pattern: how the value is shown, for `str.format`.
    """

    def find(studies: Sequence[Analysis], claim: Claim) -> Measured:
        matching = [t for t in _all(studies) if _differences(t, claim.settings) == []]
        tuned = [trial for trial in matching if RATE in trial.row.tuned]
        # studies may share a trial, which must count once in the mean
        trials = list({trial.row.trial.key: trial for trial in tuned or matching}.values())
        if name.startswith("base/"):  # every trial has a copy of one evaluation
            trials = list({(t.base, t.fingerprint, t.metric(name)): t for t in trials}.values())
        values = [value for t in trials if (value := t.metric(name)) is not None]
        if not values:
            return Measured()
        several = not name.startswith("base/") and len({_setting(trial) for trial in trials}) > 1
        if several and min(values) != max(values):
            span = f"{pattern.format(min(values))} to {pattern.format(max(values))}"
            return Measured(span, "", f"no: {len(trials)} trials of several settings match")
        return Measured(
            pattern.format(fmean(values)),
            _interval(name, trials, values, pattern),
            _hardware(trials, claim) or (_OTHER_ROWS if name[:5] in ("eval/", "base/") else ""),
        )

    return find


def _interval(name: str, trials: Sequence[Scored], values: Sequence[float], pattern: str) -> str:
    """Return the 95 % interval: over examples for a held-out loss, else over trials."""
    if name == HELDOUT_LOSS and len({trial.fingerprint for trial in trials}) == 1:
        losses = np.stack([trial.losses for trial in trials])
        low, high = compare(losses, trials[0].tokens, clusters=trials[0].clusters).interval()
    elif len(values) > 1:
        reach = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
        low, high = fmean(values) - reach, fmean(values) + reach
    else:
        return "one trial"
    return f"{pattern.format(low)} to {pattern.format(high)}"


def effect(key: str, first: Any, second: Any) -> Callable[[Sequence[Analysis], Claim], Measured]:
    """Return a lookup of a step of one key, in the study nearest to the claim's settings.

    Of studies that are equally near, one that was tuned and run with several seeds is preferred.

    Args:
        key: the swept key.
        first: its value before the step.
        second: its value after the step.
    """

    def find(studies: Sequence[Analysis], claim: Claim) -> Measured:
        shown_pair = {show(first), show(second)}
        ranked: list[tuple[tuple[int, int], Measured]] = []
        for study in studies:
            for contrast in study.effects:
                if (
                    contrast.key != key
                    or {show(contrast.first), show(contrast.second)} != shown_pair
                ):
                    continue
                trial = study.comparison.trials[0]
                differs = _differences(trial, claim.settings)
                lacks = (RATE not in trial.row.tuned) + (contrast.seeds < 2)
                words = ", ".join(filter(None, (contrast.verdict, contrast.rates)))
                ends = contrast.estimate.interval()
                measured = _as_measured(contrast.estimate.difference, ends, words, differs)
                ranked.append(((len(differs), lacks), measured))
        return _nearest(ranked)

    return find


def sensitivity(studies: Sequence[Analysis], claim: Claim) -> Measured:
    """Return how much more the loss of nf4 changes over the learning rates than that of `none`."""
    ranked: list[tuple[tuple[int, int], Measured]] = []
    for study in studies:
        comparison = study.comparison
        if set(comparison.keys) != {_QUANT, RATE}:
            continue  # another swept key would mix its own effect into the four corners
        rates = values_of(comparison, RATE)
        ends = {_QUANT: ("none", "nf4"), RATE: (rates[0], rates[-1])}
        for test in study.interactions:
            if ends != {test.key: (test.first, test.second), test.other: (test.low, test.high)}:
                continue
            low, high = test.half.interval()
            words = (
                f"lr {show(rates[0])} to {show(rates[-1])}: {_rate_steps(comparison, ends[RATE])}"
            )
            differs = _differences(comparison.trials[0], claim.settings)
            words += "; one seed" * (test.half.seeds < 2)
            change = 2 * test.half.difference
            measured = _as_measured(change, (2 * low, 2 * high), words, differs)
            ranked.append(((len(differs), test.half.seeds < 2), measured))
    return _nearest(ranked)


def _rate_steps(comparison: Comparison, rates: tuple[Any, Any]) -> str:
    """Describe what the step between two learning rates does to the loss of each quantization."""
    matched = (
        m
        for key, *pair, m in matches(comparison, with_ends=True)
        if (key, *pair) == (RATE, *rates)
    )
    steps = {
        pair[0][0].row.swept[_QUANT]: mean_estimate([pair], comparison).difference
        for pair in next(matched, [])
    }
    return ", ".join(f"{kind} {steps[kind]:+.4f}" for kind in ("none", "nf4"))


def _nearest(ranked: Sequence[tuple[tuple[int, int], Measured]]) -> Measured:
    """Return the measurement of the study that differs least from the claim, then lacks least."""
    return min(ranked, key=lambda entry: entry[0], default=((0, 0), Measured()))[1]


def _as_measured(
    difference: float, interval: tuple[float, float], words: str, differs: Sequence[str]
) -> Measured:
    low, high = interval
    reason = f"no: {', '.join(differs)}" if differs else ""
    return Measured(f"{difference:+.4f} nats ({words})", f"{low:+.4f} to {high:+.4f}", reason)


def _setting(trial: Scored) -> str:
    """Return a key that is equal for trials that differ only in the seed and in tuned settings."""
    free = ("seed", *trial.row.tuned)
    return canonical_json({k: v for k, v in trial.settings.items() if k not in free})


def _all(studies: Iterable[Analysis]) -> list[Scored]:
    return [trial for study in studies for trial in study.comparison.trials]


def _differences(trial: Scored, wanted: Mapping[str, Any]) -> list[str]:
    """List the settings in which a trial differs from the claim."""
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


def _label(name: str) -> str:
    return METRICS[f"eval/{name}"].label


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "R0", "training takes 1.62 GB", _V01, "T4", metric("memory/train_peak_mib", "{:.0f} MiB")
    ),
    Claim(
        "R0", "inference takes 1.03 GB", _V01, "T4", metric("memory/infer_peak_mib", "{:.0f} MiB")
    ),
    Claim(
        "R0",
        "about 12 tokens/s",
        _V01,
        "T4",
        metric("perf/decode_tokens_per_s", "{:.1f} tokens/s"),
    ),
    Claim(
        "R1",
        "2.25 M trainable",
        {name: _ALPACA[name] for name in ("model.name", "lora.r", "lora.targets")},
        "",
        metric("size/trainable_params", "{:.0f}"),
    ),
    *(
        Claim("R1", f"{_label(name)} {value:g} {who}", _ALPACA, "", metric(f"{group}/{name}"))
        for name, (before, after) in _QUALITY.items()
        for who, group, value in (("before", "base", before), ("after", "eval", after))
    ),
    Claim(
        "R2",
        "fits into 8 GB",
        {**_DOLLY, "quant.kind": "nf4"},
        "3070",
        metric("memory/train_peak_mib", "{:.0f} MiB"),
    ),
    Claim("R2", "4-bit is more sensitive to the learning rate", _DOLLY, "", sensitivity),
    Claim("R3", "base loss 2.124", _R3_BASE, "", metric("base/loss")),
    *(
        Claim(
            "R3",
            f"loss {loss} with r {r}, n {n}",
            {**_R3, "lora.r": r, "data.n": n},
            "",
            metric(HELDOUT_LOSS),
        )
        for r, n, loss in ((8, 1500, 1.698), (16, 1500, 1.698), (16, 3000, 1.680))
    ),
    Claim("R3", "r 16 gives little over r 8", _R3, "", effect("lora.r", 8, 16)),
    Claim("R3", "3,000 rows give little over 1,500", _R3, "", effect("data.n", 1500, 3000)),
    Claim(
        "R4",
        "runs on a T4 (no numbers published)",
        {"model.name": "tinyllama", "data.name": "indicvault"},
        "T4",
        metric(PERPLEXITY, "perplexity {:.2f}"),
    ),
)


def print_claims(root: Path, console: Console) -> None:
    """Print a table of all claims: what was measured, the interval, and whether both compare."""
    studies = _studies(root)
    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=(0, 1))
    for head in ("project", "claim", "measured", "95 %", "comparable?"):
        table.add_column(head)
    for claim in CLAIMS:
        measured = claim.find(studies, claim)
        same = "-" if measured.value == NOT_MEASURED else measured.differs or "yes"
        cells = (claim.project, claim.text, measured.value, measured.interval or "-", same)
        table.add_row(*(Text(shown(cell, 300)) for cell in cells))
    console.print(table)


def _studies(root: Path) -> list[Analysis]:
    studies = []
    for name in study_names(root):
        try:
            rows = read_study(StudyFolder(root, name))
        except StudyError:
            continue  # the report of the damaged study names the damage
        # published losses are per token, so bits per byte would not answer a claim
        studies.append(Analysis(rows, EVERY_PAIR, by_text=False))
    return [study for study in studies if study.comparison.trials]
