"""Reports what a trial would train on and be scored on: the worker half of the `data` command.

`python -m tinyllama_lab.core.data_report` reads a JSON list of configurations from standard
input, each with the groups `model`, `data` and `eval`, and with `seed`. It loads tokenizers, never
weights.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.text import Text

from tinyllama_lab.config.schema import DataConfig, EvalConfig, ModelConfig, part
from tinyllama_lab.core.dataset.dataset import DataCache, Examined, Example, changes, fingerprint
from tinyllama_lab.core.dataset.example import token_text
from tinyllama_lab.core.models.loading import read_tokenizer
from tinyllama_lab.data.rows import RawRow
from tinyllama_lab.errors import DataError, LabError, printable, shown, user_errors
from tinyllama_lab.output import accept_any_text, line_width

ROWS_SHOWN = 3
TOKENS_SHOWN = 20  # at either end of a run
_BEGIN, _END = ">>>", "<<<"  # around supervised text
_SUPERVISED = "bold green"


def report(configs: Sequence[Mapping[str, Any]], console: Console) -> list[LabError]:
    """Print every data set; return the errors of those that cannot be trained on."""
    from tinyllama_lab.core.training.prepare import prepare  # late: its libraries print on import

    caches: dict[str, DataCache] = {}
    refused: list[LabError] = []
    for number, config in enumerate(configs):
        model, data = part(ModelConfig, config["model"]), part(DataConfig, config["data"])
        evaluation = part(EvalConfig, config["eval"])
        if number:
            console.rule(style="dim")
        # one cache for each tokenizer, because tokens of rows are cached there
        key = json.dumps(config["model"], sort_keys=True)
        if key not in caches:
            caches[key] = DataCache(*read_tokenizer(model))
        seed = int(config.get("seed", 0))
        examined = caches[key].examine(data, seed)
        try:
            prepare(caches[key], data, evaluation, seed)
        except DataError as error:
            refused.append(error)  # printed here, and again after several sets
            if console.is_terminal or len(configs) > 1:
                console.print(
                    Text(f"error: {printable(str(error))}\n", style="bold red"), soft_wrap=True
                )
        for name, text in _summary(examined, model):
            console.print(
                Text(f"{name:<16}", style="bold") + Text(printable(text)), soft_wrap=True
            )
        for line in _rows(examined, caches[key], console.is_terminal):
            console.print(line, soft_wrap=True)
    return refused


def _summary(examined: Examined, model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each line."""
    data = examined.data  # with the recognised columns
    train, heldout = examined.examples(examined.train), examined.examples(examined.heldout)
    where = data.repo or data.path or data.name
    yield "data", f"{shown(str(where), 300)}: {examined.split.rows} rows"
    for note in examined.split.notes:
        yield "", note
    yield "tokenizer", f"{shown(model.name)}, data.style={data.style}"
    confirming = examined.examples(examined.confirmation)
    parts = ("training", train), ("held out", heldout), ("confirmation", confirming)
    for name, examples in parts:
        tokens = sum(len(each.ids) for each in examples)
        labels = sum(each.labels for each in examples)
        counts = f"{len(examples)} rows, {tokens:,} tokens, {labels:,} of them supervised"
        if name == "confirmation" and heldout and not examples:
            counts = f"0 rows: {examined.why_unconfirmed()}"
        yield name, counts + _lengths(examples)
    yield "fingerprints", f"training {fingerprint(train)}, held out {fingerprint(heldout)}"
    beyond = "" if data.train_rows is None else f", {examined.beyond} beyond data.n={data.n}"
    are_marked = examined.split.resplit is None or examined.split.test
    spare = "held-out rows that are not scored" if are_marked else "rows in reserve for scoring"
    spare_rows = examined.reserve + len(examined.split.test) - len(confirming)
    yield "not used", f"{spare_rows} {spare}{beyond}"
    left_out = examined.left_out
    yield "left out", left_out.sentence(examined.split.rows) or "nothing"
    for rows in left_out.listed:
        yield "", rows
    for reason, detail in left_out.details.items():
        yield "", f"row {left_out.first.get(reason, '?')}: {shown(detail, 300)}"
    cut = sum(each.is_cut for each in (*train, *heldout))
    are_cut = "1 answer is" if cut == 1 else f"{cut} answers are"
    yield "cut", f"{are_cut} cut at data.max_length={data.max_length}" if cut else "nothing"
    examples = [*train, *heldout]
    folded, trimmed = (sum(e.is_folded for e in examples), sum(e.is_trimmed for e in examples))
    for note in changes(folded, trimmed, len(examples)):
        yield "changed", note


def _lengths(examples: Sequence[Example]) -> str:
    lengths = [len(each.ids) for each in examples]
    if not lengths:
        return ""
    return f"; {min(lengths)} to {max(lengths)} tokens a row, median {median(lengths):.0f}"


def _rows(examined: Examined, cache: DataCache, in_color: bool) -> Iterator[Text]:
    """Yield some training rows as text and as tokens, with supervised parts marked."""
    if examined.train and not in_color:
        yield Text(f"\nSupervised text and tokens are between {_BEGIN} and {_END}.")
    for example in examined.examples(_different(examined)):
        yield Text(f"\nrow {example.number}", style="bold")
        yield _marked(_pieces(example, cache), in_color)
        tokens = [(_tokens(run, cache), supervised) for run, supervised in _runs(example)]
        yield Text("tokens: ", style="bold") + _marked(tokens, in_color, " ")


def _different(examined: Examined) -> list[RawRow]:
    """Return training rows that differ: the shortest, the longest, and one of another form.

    If all have the same form, the third is of middle length. Rows are in the order of the file.
    """
    lengths = [len(each.ids) for each in examined.examples(examined.train)]
    rows = [r for _, r in sorted(zip(lengths, examined.train, strict=True), key=lambda e: e[0])]
    ends = [rows[0], rows[-1]] if len(rows) > 1 else rows
    between = [*rows[len(rows) // 2 : -1], *rows[1 : len(rows) // 2]]
    others = [row for row in between if _form(row) not in map(_form, ends)] or between
    return sorted([*ends, *others[: ROWS_SHOWN - len(ends)]], key=lambda row: row.number)


def _form(row: RawRow) -> tuple[bool, ...]:
    """Return which optional parts a row has besides a prompt and a response."""
    turns = [turn.role for turn in row.messages]
    has_system = bool(row.system) or "system" in turns
    several = turns.count("assistant") > 1
    return bool(row.context), has_system, bool(row.tools), "tool" in turns, several


def _marked(parts: Sequence[tuple[str, bool]], in_color: bool, between: str = "") -> Text:
    text = Text()
    for number, (piece, is_supervised) in enumerate(parts):
        text.append(between if number else "")
        piece = printable(piece)
        if is_supervised and not in_color:
            piece = f"{_BEGIN}{between}{piece}{between}{_END}"
        text.append(piece, style=_SUPERVISED if is_supervised else "dim")
    return text


def _runs(example: Example) -> list[tuple[list[int], bool]]:
    """Return runs of neighbouring tokens that are all supervised, or all not."""
    runs: list[tuple[list[int], bool]] = []
    for token, supervised in zip(example.ids, example.loss_mask, strict=True):
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(token)
    return runs


def _tokens(run: Sequence[int], cache: DataCache) -> str:
    """Return id and text of every token; of a long run both ends, where mistakes are."""
    words = [f"{token} {token_text(token, cache.tokenizer)}" for token in run]
    if len(words) > 2 * TOKENS_SHOWN + 1:  # a note for one token would be longer than the token
        left_out = f"... {len(words) - 2 * TOKENS_SHOWN} tokens ..."
        words = [*words[:TOKENS_SHOWN], left_out, *words[-TOKENS_SHOWN:]]
    return " ".join(words)


def _pieces(example: Example, cache: DataCache) -> list[tuple[str, bool]]:
    """Return the text of each run. Decoded alone, a run would lose its leading space."""
    pieces, before, ids = [], "", list[int]()
    for run, supervised in _runs(example):
        ids += run
        text = str(cache.tokenizer.decode(ids))
        pieces.append((text[len(before) :], supervised))
        before = text
    return pieces


def main() -> None:
    """Read configurations and print the report; exit with 2 if one cannot be trained on."""
    accept_any_text()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # nothing here is quantized
    console = Console(width=line_width(), highlight=False)
    with user_errors():
        configs = json.load(sys.stdin)
        refused = report(configs, console)
        is_in_view = sys.stdout.isatty() and len(configs) == 1
        for error in [] if is_in_view else refused:
            print(f"error: {printable(str(error))}", file=sys.stderr)
        if refused:
            raise SystemExit(LabError.exit_code)


if __name__ == "__main__":
    main()
