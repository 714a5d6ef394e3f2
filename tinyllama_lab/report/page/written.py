"""What trials wrote, by prompt, small enough to lie inside a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyllama_lab.report.analysis.comparable import SEED, label_of
from tinyllama_lab.report.analysis.curves import held_out_loss
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.text import clean, one_line
from tinyllama_lab.study.trial import canonical_json

MOST_TRIALS = 40  # with the lowest held-out loss; bases come on top
MOST_PROMPTS = 200
MOST_BYTES = 3_500_000  # of all texts together
LONGEST = 4000
SHORTEST = 120
CARDS = 4  # side by side


@dataclass
class Written:
    """Prompts by content, and what each trial wrote to each."""

    prompts: list[dict[str, str]] = field(default_factory=list)  # prompt, reference, intent
    trials: list[dict[str, Any]] = field(default_factory=list)  # label, outputs by prompt number
    notes: list[str] = field(default_factory=list)  # what is not shown, and why
    first: list[int] = field(default_factory=list)  # which of them are shown at first

    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        return {"prompts": self.prompts, "trials": self.trials, "first": self.first}


Generation = dict[str, str]


def read_written(rows: Sequence[TrialRow]) -> Written:
    """The bases and the best trials that wrote something."""
    found: list[tuple[TrialRow, list[Generation]]] = []
    damaged = 0
    bases = [row for row in rows if row.is_base]
    trials = sorted((row for row in rows if not row.is_base), key=held_out_loss)
    skipped = 0
    for row in [*bases, *trials]:
        if len(found) >= MOST_TRIALS + len(bases):
            skipped += row.result is not None
            continue
        generations, bad = _read(row)
        damaged += bad
        if generations:
            found.append((row, generations))
    written = _gathered(found)
    written.first = _first([row for row, _ in found])
    if skipped:
        written.notes.append(
            f"The {MOST_TRIALS} trials with the lowest held-out loss are here; what {skipped} "
            "others wrote lies in generations.jsonl, in the eval folders of their trials."
        )
    if damaged:
        written.notes.append(f"{damaged} damaged lines of generations.jsonl were passed over.")
    return written


def _first(rows: Sequence[TrialRow]) -> list[int]:
    """The best trial, its base before it, and the best of other settings rather than its seeds."""
    trials = [number for number, row in enumerate(rows) if not row.is_base]
    settings = [canonical_json({k: v for k, v in r.swept.items() if k != SEED}) for r in rows]
    others = [n for n in trials if settings[n] not in settings[trials[0] : n]]
    own = rows[trials[0]].base if trials else None
    bases = [n for n, row in enumerate(rows) if row.is_base and own and row.scores.shares(own)]
    every = [*bases[:1], *others, *trials, *range(len(rows))]
    return list(dict.fromkeys(every))[:CARDS]


def _read(row: TrialRow) -> tuple[list[Generation], int]:
    """The sound lines of a file, and the number of the others."""
    try:
        lines = row.scores.generations_file.read_bytes().split(b"\n")
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


def _gathered(found: Sequence[tuple[TrialRow, list[Generation]]]) -> Written:
    """Prompts are told apart by what they say, so trials with other sets meet where they can."""
    prompts: dict[str, Generation] = {}
    for _, generations in found:
        for generation in generations:
            prompts.setdefault(generation["prompt"], generation)
    chosen = list(prompts)[:MOST_PROMPTS]
    limit = _limit(len(chosen), len(found), found)
    written = Written()
    for prompt in chosen:
        about = {k: clean(prompts[prompt].get(k, ""), limit) for k in ("prompt", "reference")}
        intent = one_line(prompts[prompt].get("intent", ""))
        written.prompts.append(about | {"intent": intent})
    for row, generations in found:
        by_prompt = {generation["prompt"]: generation for generation in generations}
        outputs = [_shown(by_prompt.get(prompt), limit) for prompt in chosen]
        about_trial = {"label": _label(row), "base": row.is_base}
        written.trials.append(about_trial | {"outputs": outputs})
    if len(prompts) > len(chosen):
        written.notes.append(f"The first {len(chosen)} of {len(prompts)} prompts are here.")
    if limit < LONGEST:
        written.notes.append(f"Every text is cut after {limit} characters.")
    return written


def _limit(prompts: int, trials: int, found: Sequence[tuple[TrialRow, list[Generation]]]) -> int:
    """Characters of one text, so that all of them are not too large together."""
    if not prompts:
        return LONGEST
    texts = (
        text
        for _, generations in found
        for generation in generations
        for text in generation.values()
    )
    size = sum(min(len(text.encode("utf-8", "replace")), 4 * LONGEST) for text in texts)
    if size <= MOST_BYTES:
        return LONGEST
    each = MOST_BYTES // (4 * prompts * (2 * trials + 2))  # of four bytes, some drawn twice
    return min(LONGEST, max(SHORTEST, each))


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
