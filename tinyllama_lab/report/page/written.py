"""The completions that trials generated, by prompt, small enough to be part of a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyllama_lab.report.analysis.comparison import SEED, label_of
from tinyllama_lab.report.analysis.curves import held_out_loss
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.text import clean, one_line
from tinyllama_lab.study.trial import canonical_json

MOST_TRIALS = 40  # those with the lowest held-out loss; bases are extra
MOST_PROMPTS = 200
MOST_BYTES = 3_500_000  # of all texts together, so that a browser opens the page without delay
LONGEST = 4000  # characters of one text
SHORTEST = 120  # to which texts are cut at most, even if the page gets larger
CARDS = 4  # completions side by side


@dataclass
class Written:
    """Prompts by content, and the completion of each trial for each of them."""

    prompts: list[dict[str, str]] = field(default_factory=list)  # prompt, reference, intent
    trials: list[dict[str, Any]] = field(default_factory=list)  # label, outputs by prompt number
    notes: list[str] = field(default_factory=list)  # on what is not shown
    first: list[int] = field(default_factory=list)  # numbers of the trials that are shown at first

    def data(self) -> dict[str, Any]:
        """Return the JSON that the page's script reads."""
        return {"prompts": self.prompts, "trials": self.trials, "first": self.first}


Generation = dict[str, str]


def read_written(rows: Sequence[TrialRow]) -> Written:
    """Read the completions of the bases and of the trials with the lowest held-out loss."""
    generations_by_row: list[tuple[TrialRow, list[Generation]]] = []
    damaged = 0
    bases = [row for row in rows if row.is_base]
    trials = sorted((row for row in rows if not row.is_base), key=held_out_loss)
    skipped = 0
    for row in [*bases, *trials]:
        if len(generations_by_row) >= MOST_TRIALS + len(bases):
            skipped += row.result is not None
            continue
        generations, bad = _read(row)
        damaged += bad
        if generations:
            generations_by_row.append((row, generations))
    written = _gathered(generations_by_row)
    written.first = _first([row for row, _ in generations_by_row])
    if skipped:
        written.notes.append(
            f"The {MOST_TRIALS} trials with the lowest held-out loss are here; the completions of "
            f"{skipped} others are in generations.jsonl, in the eval folders of their trials."
        )
    if damaged:
        written.notes.append(f"{damaged} damaged lines of generations.jsonl were skipped.")
    return written


def _first(rows: Sequence[TrialRow]) -> list[int]:
    """Return what is shown at first: the base of the best trial, and the best of each setting."""
    trials = [number for number, row in enumerate(rows) if not row.is_base]
    settings = [canonical_json({k: v for k, v in r.swept.items() if k != SEED}) for r in rows]
    others = [n for n in trials if settings[n] not in settings[trials[0] : n]]
    base = rows[trials[0]].base if trials else None
    bases = [
        n for n, row in enumerate(rows) if row.is_base and base and row.evaluations.shares(base)
    ]
    every = [*bases[:1], *others, *trials, *range(len(rows))]
    return list(dict.fromkeys(every))[:CARDS]


def _read(row: TrialRow) -> tuple[list[Generation], int]:
    """Return the sound lines of a file, and the number of damaged ones."""
    try:
        # as bytes: one line in another encoding must not cost the others
        lines = row.evaluations.generations_file.read_bytes().split(b"\n")
    except OSError:
        return [], 0
    generations, damaged = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            generation = {name: str(record[name]) for name in ("prompt", "reference", "output")}
            generation |= {k: str(v) for k in ("intent", "sampled") if (v := record.get(k))}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged += 1
        else:
            generations.append(generation)
    return generations, damaged


def _gathered(generations_by_row: Sequence[tuple[TrialRow, list[Generation]]]) -> Written:
    """Join the completions by the text of the prompt, so that trials with other prompts fit in."""
    prompts: dict[str, Generation] = {}
    for _, generations in generations_by_row:
        for generation in generations:
            prompts.setdefault(generation["prompt"], generation)
    chosen = list(prompts)[:MOST_PROMPTS]
    limit = _limit(len(chosen), len(generations_by_row), generations_by_row)
    written = Written()
    for prompt in chosen:
        about = {k: clean(prompts[prompt].get(k, ""), limit) for k in ("prompt", "reference")}
        intent = one_line(prompts[prompt].get("intent", ""))
        written.prompts.append(about | {"intent": intent})
    for row, generations in generations_by_row:
        by_prompt = {generation["prompt"]: generation for generation in generations}
        outputs = [_shown(by_prompt.get(prompt), limit) for prompt in chosen]
        about_trial = {"label": _label(row), "base": row.is_base}
        written.trials.append(about_trial | {"outputs": outputs})
    if len(prompts) > len(chosen):
        written.notes.append(f"The first {len(chosen)} of {len(prompts)} prompts are here.")
    if limit < LONGEST:
        written.notes.append(f"Every text is cut after {limit} characters.")
    return written


def _limit(
    prompts: int, trials: int, generations_by_row: Sequence[tuple[TrialRow, list[Generation]]]
) -> int:
    """Return the characters that one text may have, so that all of them fit into the page."""
    if not prompts:
        return LONGEST
    texts = (
        text
        for _, generations in generations_by_row
        for generation in generations
        for text in generation.values()
    )
    size = sum(min(len(text.encode("utf-8", "replace")), 4 * LONGEST) for text in texts)
    if size <= MOST_BYTES:
        return LONGEST
    # Per prompt: the prompt, its reference, and for each trial an output and a sampled output. A
    # character takes up to four bytes in UTF-8.
    characters = MOST_BYTES // (4 * prompts * (2 * trials + 2))
    return min(LONGEST, max(SHORTEST, characters))


def _shown(generation: Generation | None, limit: int) -> dict[str, str] | None:
    if generation is None:
        return None
    return {k: clean(generation[k], limit) for k in ("output", "sampled") if k in generation}


def _label(row: TrialRow) -> str:
    words = one_line(label_of(row))
    if row.is_base:
        return f"base ({words})" if row.swept else "base"
    loss = held_out_loss(row)
    return f"{words} · loss {loss:.3f}" if loss < float("inf") else words
