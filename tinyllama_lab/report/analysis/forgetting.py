"""What the recommended setting lost: its loss on unrelated text against that of the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tinyllama_lab.report.analysis.example_losses import read_losses
from tinyllama_lab.report.analysis.measure import NATS, between
from tinyllama_lab.report.analysis.recommend import Candidate
from tinyllama_lab.report.analysis.statistics import Estimate, compare


def forgetting(cells: Sequence[Candidate]) -> Iterator[str]:
    """A sentence on the chosen setting; none where `eval.general` was off."""
    for chosen in (cell for cell in cells if cell.is_chosen):
        if estimate := general_difference(chosen):
            runs = "" if estimate.seeds > 1 else ", of other passages, not of other runs"
            yield (
                f"on unrelated text, against the base: {NATS.change(estimate.difference)} "
                f"(95 % interval: {between(*estimate.interval())}{runs})"
            )


def general_difference(cell: Candidate) -> Estimate | None:
    """The loss of the setting minus that of the base, passage by passage; above 0 it lost."""
    differences, tokens = [], None
    for trial in cell.trials:
        base = trial.row.base
        ours = read_losses(trial.row.scores.general_file)
        theirs = read_losses(base.general_file) if base else None
        if ours is None or theirs is None or ours.tokens.tolist() != theirs.tokens.tolist():
            return None
        differences.append(ours.nats - theirs.nats)
        tokens = ours.tokens
    if tokens is None or len(tokens) < 2:
        return None
    return compare(np.stack(differences), tokens)
