"""The table at the end of a sweep: a row for each trial, and one for each base."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama_lab.config.axes import flatten, flatten_shown, short_name, show, swept_keys
from tinyllama_lab.report.analysis.outdated import outdated
from tinyllama_lab.report.analysis.tuned import settled
from tinyllama_lab.report.text import counted, one_line
from tinyllama_lab.study.evaluations import HELDOUT, Scores, join_bases, read_scores
from tinyllama_lab.study.study import Study
from tinyllama_lab.study.trial import EVAL, Result, State, Trial, digest, trial_key, write_atomic

# of code, links, and where letters touch them, emphasis
_MARKS = re.compile(r"[`\[]|\*(?=\S)|(?<=\S)\*|(?<!\w)_|_(?!\w)")
MISSING = "-"
CONFIRMED = "Confirmation trials: fresh seeds, scored on rows that no choice has seen"
RESCORED = "The same trials on the confirmation rows: no confirmation, their seeds are not fresh"
BEST = "*"
OUTDATED = "†"


@dataclass(frozen=True)
class _Scored:
    """A trial on one kind of rows; in the configuration stands the evaluation that is shown."""

    config: dict[str, Any]
    scores: Scores


_Trials = dict[Trial, _Scored]


@dataclass(frozen=True)
class Row:
    """A trial, or a base where `is_base`; `swept` holds its values of the swept keys."""

    trial: Trial
    result: Result | None
    scores: Scores
    swept: dict[str, Any]
    is_base: bool = False
    is_best: bool = False
    base: Scores | None = None  # of what a trial is compared with
    settings: dict[str, Any] = field(default_factory=dict, compare=False)  # all of them, flat
    tuned: tuple[str, ...] = ()  # the settings that its study tunes
    is_candidate: bool = False  # of the tuning
    is_beaten: bool = False  # another value of what is tuned stands for its setting and seed
    outdated: str = ""  # why it is not compared with the others, which came later


def read_study(study: Study) -> list[Row]:
    """Bases first, then trials in the order of their swept values; the best one is marked.

    Swept are the keys that differ among the trials on the newest data and model; the other trials
    come last. Trials that confirm what others chose are not among them.
    """
    trials, _, _ = _trials(study)
    rows = _rows(study, trials)
    reasons = outdated(rows)
    configs = {trial: each.config for trial, each in trials.items()}
    keys = _keys([each for trial, each in configs.items() if trial.key not in reasons])
    rows = [
        replace(row, outdated=reasons.get(row.trial.key, ""))
        for row in _with_values(rows, trials, keys)
    ]
    rows.sort(key=lambda r: (bool(r.outdated), [_sortable(value) for value in r.swept.values()]))
    return [*_bases(rows), *_mark_best(settled(rows, study.read_tuned(), configs))]


def read_confirmation(study: Study) -> list[Row]:
    """The trials that confirm what others chose, with the swept values of those and a seed.

    Those are the ones that were not scored on held-out rows, by which the others are chosen.
    """
    _, trials, _ = _trials(study)
    return _apart(study, trials)


def read_rescored(study: Study) -> list[Row]:
    """The trials of `read_study` on the confirmation rows, as far as they were scored there."""
    _, _, trials = _trials(study)
    return _apart(study, trials)


def _apart(study: Study, trials: _Trials) -> list[Row]:
    """Rows with the swept values of `read_study` and a seed."""
    if not trials:
        return []
    keys = dict.fromkeys(key for row in read_study(study) for key in row.swept)
    rows = _with_values(_rows(study, trials), trials, [*keys | {"seed": None}])
    return sorted(rows, key=lambda row: [_sortable(value) for value in row.swept.values()])


def _trials(study: Study) -> tuple[_Trials, _Trials, _Trials]:
    """Those scored on held-out rows, if any; all others; the first on confirmation rows."""
    choosing, others, rescored = _Trials(), _Trials(), _Trials()
    for trial in study.trials():
        config = trial.read_config()
        for rows, scores in (found := read_scores(trial, config[EVAL])).items():
            group = choosing if rows == HELDOUT else rescored if HELDOUT in found else others
            group[trial] = _Scored({**config, EVAL: scores.settings}, scores)
    return (choosing, others, rescored) if choosing else (others, _Trials(), rescored)


def _keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """What is swept: how trials are scored only where nothing else tells them apart."""
    keys = swept_keys(configs)
    if len({trial_key(each) for each in configs}) < len(configs):  # of an earlier version
        return keys
    return [key for key in keys if not key.startswith(f"{EVAL}.")]


def _rows(study: Study, trials: _Trials) -> list[Row]:
    """The trials, without the values of swept keys."""
    bases: dict[tuple[Trial, ...], Scores] = {}
    return [
        Row(
            trial,
            each.scores.result,
            each.scores,
            {},
            base=_base_of(study, each, bases),
            settings=flatten(each.config),
        )
        for trial, each in trials.items()
    ]


def _base_of(study: Study, scored: _Scored, known: dict[tuple[Trial, ...], Scores]) -> Scores:
    """The scores of the base in every evaluation of a trial."""
    settings = [part.settings for part in scored.scores.parts] or [scored.scores.settings]
    by_base = {study.base({**scored.config, EVAL: each}, "base"): each for each in settings}
    if tuple(by_base) not in known:
        scores = [read_scores(base, own)[own["rows"]] for base, own in by_base.items()]
        known[tuple(by_base)] = join_bases(scores)
    return known[tuple(by_base)]


def _with_values(rows: Sequence[Row], trials: _Trials, keys: Sequence[str]) -> list[Row]:
    shown = {trial: flatten_shown(each.config) for trial, each in trials.items()}
    return [replace(row, swept={key: shown[row.trial].get(key) for key in keys}) for row in rows]


def _bases(rows: Sequence[Row]) -> list[Row]:
    """One row for each base that is compared with: a model, its quantization, its held-out set.

    Evaluations that differ in nothing else, such as the number of generations, are one row.
    """
    found: dict[str, list[tuple[Scores, dict[str, Any]]]] = {}
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
        found.setdefault(digest([identity, scored_on]), []).append((row.base, values))
    scores = [(join_bases([base for base, _ in own]), own[0][1]) for own in found.values()]
    return [Row(each.trial, each.result, each, values, is_base=True) for each, values in scores]


def _mark_best(rows: list[Row]) -> list[Row]:
    """Mark the lowest held-out loss, where the rows were scored on the same tokens or text."""
    name = _ranked_by(rows)
    done = [r for r in _done(rows) if name and isfinite(_metric(r, name)) and _stands(r)]
    if not done:
        return rows
    best = min(done, key=lambda r: _metric(r, name))
    return [Row(**{**vars(r), "is_best": True}) if r is best else r for r in rows]


def _stands(row: Row) -> bool:
    """Whether it was tuned, where the study tunes, and no other value beat it."""
    return not row.is_beaten and (row.is_candidate or not row.tuned)


def _done(rows: Sequence[Row]) -> list[Row]:
    return [
        row
        for row in rows
        if not row.is_base and not row.outdated and row.result and row.result.state is State.DONE
    ]


def _ranked_by(rows: Sequence[Row]) -> str:
    """The metric that says the same of all rows; empty where none does.

    That is the loss a token, but for several sets of held-out tokens or several bases: there it
    is bits per byte, if the text is the same.
    """
    results = [row.result for row in _done(rows) if row.result]
    bases = {r.model.get("revision") for r in results}  # its name may be a label
    if len({r.data.get("eval_fingerprint") for r in results}) <= 1 and len(bases) <= 1:
        return "eval/loss"
    texts = {r.data.get("eval_text_fingerprint") for r in results}
    return _BITS[1] if len(texts) == 1 and None not in texts else ""


def _metric(row: Row, name: str) -> float:
    return row.result.metrics.get(name, float("inf")) if row.result else float("inf")


def _sortable(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, show(value))


Column = tuple[str, Callable[[Row], str]]


def columns(rows: Sequence[Row]) -> list[Column]:
    """Head and cell text of every column that says something."""
    keys = list(dict.fromkeys(key for row in rows for key in row.swept))
    found: list[Column] = [("trial", _name)] if not keys else []
    found += [(one_line(short_name(key)), _swept_cell(key)) for key in keys]
    found.append(("state", state_cell))
    for head, name, pattern in (*([_BITS] if _ranked_by(rows) == _BITS[1] else []), *_METRICS):
        if any(name in row.result.metrics for row in rows if row.result):
            found.append((head, metric_cell(name, pattern)))
    found.append(("min", _minutes))
    return found


_BITS = ("bits/byte", "eval/bits_per_byte", "{:.4f}")
_METRICS = (
    ("eval loss", "eval/loss", "{:.4f}"),
    ("ppl", "eval/perplexity", "{:.2f}"),
    ("intent", "eval/intent_accuracy", "{:.1%}"),
    ("tok/s", "perf/train_tokens_per_s", "{:.0f}"),
    ("peak MiB", "memory/train_peak_mib", "{:.0f}"),
    ("adapter MiB", "size/adapter_mib", "{:.1f}"),
)


def _name(row: Row) -> str:
    return "base" if row.is_base else row.trial.name


def _swept_cell(key: str) -> Callable[[Row], str]:
    return lambda row: one_line(_short(row.swept[key])) if key in row.swept else MISSING


def _short(value: Any) -> str:
    """Four digits are enough to tell the numbers of a search apart."""
    return f"{value:.4g}" if isinstance(value, float) else show(value)


def metric_cell(name: str, pattern: str) -> Callable[[Row], str]:
    """The text of a metric's cell."""

    def cell(row: Row) -> str:
        if row.result is None or name not in row.result.metrics:
            return MISSING
        return pattern.format(row.result.metrics[name])

    return cell


def state_cell(row: Row, best: str = f" {BEST}") -> str:
    """How it ended; `best` is added to the best row's."""
    state = str(row.result.state) if row.result else "missing"
    if row.is_base:
        return "base" if row.result else "base (missing)"
    return state + f" {OUTDATED}" * bool(row.outdated) + best * row.is_best


def _minutes(row: Row) -> str:
    if row.result is None or row.is_base:
        return MISSING
    return f"{row.result.metrics.get('perf/trial_seconds', 0.0) / 60:.1f}"


def print_confirmation(rows: Sequence[Row], console: Console) -> None:
    """The table of the confirmation trials, apart from the others."""
    print_apart(CONFIRMED, rows, console)


def print_apart(title: str, rows: Sequence[Row], console: Console) -> None:
    """A table under a title of its own, if there are rows."""
    if rows:
        console.print(title, highlight=False, soft_wrap=True)
        print_table(rows, console)


def print_table(rows: Sequence[Row], console: Console) -> None:
    """The table on a terminal; cells are text, whatever they hold."""
    beaten = sum(row.is_beaten for row in rows)
    rows = [row for row in rows if not row.is_beaten]
    if not rows:
        return
    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=(0, 1))
    shown = columns(rows)
    for number, (head, _) in enumerate(shown):
        table.add_column(Text(head), justify="left" if number == 0 else "right")
    for row in rows:
        style = "bold green" if row.is_best else "dim" if row.is_base else ""
        table.add_row(*(Text(cell(row)) for _, cell in shown), style=style)
    needed = console.measure(table, options=console.options.update(width=10_000)).maximum
    # in a file or a pipe nothing has to be cut
    console.print(table, width=None if console.is_terminal else max(needed, console.width))
    console.print(_caption(rows), highlight=False)
    if beaten:
        tried = ", ".join(map(short_name, rows[-1].tuned))
        console.print(
            f"not shown: {counted(beaten, 'trial')} with another {tried}, which the tuning tried",
            highlight=False,
        )


def _caption(rows: Sequence[Row]) -> str:
    """What the marks mean, and what the weights of the base are where that is not plain."""
    lines = []
    if any(row.is_best for row in rows):
        kind = (
            "held-out loss"
            if _ranked_by(rows) == "eval/loss"
            else "bits per byte of held-out text"
        )
        lines.append(f"{BEST} lowest {kind} of this table")
    elif not _ranked_by(rows):
        lines.append("no best row: the trials have different held-out tokens or different bases")
    if reasons := Counter(row.outdated for row in rows if row.outdated):
        said = "; ".join(f"{counted(count, 'trial')}: {why}" for why, count in reasons.items())
        lines.append(f"{OUTDATED} not compared with the others. {said}")
    weights = {str(row.result.model.get("weights")) for row in rows if row.result}
    if repacked := sorted(text for text in weights if "dequantized" in text):
        lines.append(f"weights of the base: {'; '.join(repacked)}")
    return "\n".join(lines)


def write_table(study: Study, rows: Sequence[Row], confirmation: Sequence[Row] = ()) -> None:
    """The same as `experiment_table.md` and, with every metric, as `metrics.json`."""
    parts = [f"# {study.name}", _lines(rows), _caption(rows)]
    parts += [f"{CONFIRMED}:", _lines(confirmation)] if confirmation else []
    write_atomic(study.table_file, "\n\n".join(filter(None, parts)) + "\n")
    record = {
        "study": study.name,
        "bases": [_record(row) for row in rows if row.is_base],
        "trials": [_record(row) for row in rows if not row.is_base],
        "confirmation": [_record(row) for row in confirmation],
    }
    write_atomic(study.metrics_file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _lines(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    shown = columns(rows)
    texts = [[head for head, _ in shown], *([cell(row) for _, cell in shown] for row in rows)]
    lines = ["| " + " | ".join(map(_markdown, line)) + " |" for line in texts]
    lines.insert(1, "|---" * len(shown) + "|")
    return "\n".join(lines)


def _markdown(text: str) -> str:
    """A cell that is shown as it is: no markup of Markdown or of HTML."""
    for character, shown in (("&", "&amp;"), ("<", "&lt;"), ("\\", "\\\\"), ("|", "\\|")):
        text = text.replace(character, shown)
    return _MARKS.sub(r"\\\g<0>", text)


def _record(row: Row) -> dict[str, Any]:
    result = row.result
    return {
        "key": row.trial.key,
        "name": row.trial.name,
        "state": str(result.state) if result else "missing",
        "best": row.is_best,
        "swept": row.swept,
        "outdated": row.outdated or None,
        "error": result.error if result else None,
        "metrics": result.metrics if result else {},
        "data": result.data if result else {},
    }
