"""What each setting forgot: its loss on unrelated text compared with that of the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tinyllama_lab.report.analysis.candidates import Candidate
from tinyllama_lab.report.analysis.example_losses import read_losses
from tinyllama_lab.report.analysis.measure import NATS, between
from tinyllama_lab.report.analysis.recommendation import MOST_NAMED
from tinyllama_lab.report.analysis.statistics import Estimate, compare


def forgetting(cells: Sequence[Candidate]) -> Iterator[str]:
    """Yield a sentence on the settings, the chosen one first; none if `eval.general` was off."""
    ordered = sorted(cells, key=lambda cell: not cell.is_chosen)
    known = [(cell, lost) for cell in ordered if (lost := general_difference(cell))]
    if not known:
        return
    losses = [
        f"{cell.label}: {NATS.change(lost.difference)} ({between(*lost.interval())})"
        for cell, lost in known[:MOST_NAMED]
    ]
    runs = "" if known[0][1].seeds > 1 else " over other passages, not over other runs"
    more = f"; and {len(known) - MOST_NAMED} more settings" if len(known) > MOST_NAMED else ""
    yield (
        f"on unrelated text, against the base (95 % interval{runs} in brackets): "
        f"{'; '.join(losses)}{more}"
    )


def general_difference(cell: Candidate) -> Estimate | None:
    """Estimate the loss of a setting minus that of its base on unrelated text, by passage.

    Above zero, the setting has forgotten something. None without the losses of both.
    """
    differences, tokens = [], None
    for trial in cell.trials:
        base = trial.row.base
        ours = read_losses(trial.row.scores.general_file)
        theirs = read_losses(base.general_file) if base else None
        # other token counts mean another tokenizer or cut, and losses that cannot be paired
        if ours is None or theirs is None or ours.tokens.tolist() != theirs.tokens.tolist():
            return None
        differences.append(ours.nats - theirs.nats)
        tokens = ours.tokens
    if tokens is None or len(tokens) < 2:
        return None
    return compare(np.stack(differences), tokens)
