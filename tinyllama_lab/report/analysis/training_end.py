"""Whether the recommended setting was trained long enough, from what it logged while it trained.

Two simple looks, each silent where it has nothing to go by:

- The training loss of the last fifth of the steps, with a straight line through it. Steps of one
  pass see new rows, so their losses are independent and the line's error is the usual one. A
  learning rate that decays to zero flattens the end of every curve: where the line does not fall,
  longer training may help all the same. After the first pass a falling training loss may be
  rows learned by heart, so nothing is said.
- The held-out loss at rungs (searches alone) against that after the last step, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import linregress

from tinyllama_lab.report.analysis.comparable import Scored
from tinyllama_lab.report.analysis.contrasts import MARGIN
from tinyllama_lab.report.analysis.curves import step_losses
from tinyllama_lab.report.analysis.recommend import Candidate
from tinyllama_lab.report.analysis.statistics import ALPHA, Array, compare
from tinyllama_lab.study.events import read_events

LAST = 0.2  # of the steps
LEAST_STEPS = 10  # in that part; a line through fewer says nothing


def training_end(cells: Sequence[Candidate]) -> Iterator[str]:
    """What a reader should know of the length of the chosen setting's training."""
    for chosen in (cell for cell in cells if cell.is_chosen):
        first = chosen.trials[0]
        if (first.settings.get("train.epochs") or 0) <= 1 and not _repeats_rows(first):
            yield from _still_falling([step_losses(t.row.trial) for t in chosen.trials])
        yield from _better_before(chosen.trials)


def _repeats_rows(trial: Scored) -> bool:
    """Whether `train.max_steps` made it see rows again."""
    data = trial.row.result.data if trial.row.result else {}
    steps, batch = (trial.settings.get(f"train.{name}") for name in ("max_steps", "batch_size"))
    return bool(steps) and int(steps or 0) * int(batch or 1) > int(data.get("train_rows", 0))


def _still_falling(curves: Sequence[dict[int, float]]) -> Iterator[str]:
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    last = steps[-round(LAST * len(steps)) :] if steps else []
    if len(last) < LEAST_STEPS:
        return
    line = linregress(last, [float(np.mean([curve[step] for curve in curves])) for step in last])
    fall = -line.slope * (last[-1] - last[0])
    if line.pvalue / 2 < ALPHA and fall > MARGIN:
        yield (
            f"the training loss was still falling by {-100 * line.slope:.2g} nats per 100 steps "
            f"(± {100 * line.stderr:.1g}) at the end: longer training may help"
        )


def _rungs(trial: Scored) -> dict[int, Array]:
    """By step at which it was scored while it trained, the loss of each row, nats per token."""
    return {
        int(event["step"]): np.array(event["examples"], dtype=float)
        for event in read_events(trial.row.trial.events_file)
        if event.get("kind") == "rung" and event.get("examples")
    }


def _better_before(trials: Sequence[Scored]) -> Iterator[str]:
    """Whether an earlier step was better on the held-out rows than the last one.

    Args:
        trials: of one setting, a seed each; steps at which all of them were scored count.
    """
    first = trials[0]
    if not first.measure.is_per_token:
        return
    rungs = [_rungs(trial) for trial in trials]
    steps = set.intersection(*map(set, rungs))
    for step in sorted(
        steps, key=lambda step: float(np.mean([trial_rungs[step].mean() for trial_rungs in rungs]))
    ):
        count = min(len(trial_rungs[step]) for trial_rungs in rungs)
        tokens = first.tokens[:count]
        clusters = None if first.clusters is None else first.clusters[:count]
        if count < 2 or (clusters is not None and len(np.unique(clusters)) < 2):
            return
        differences: list[Array] = [
            trial.own_losses[:count] - trial_rungs[step][:count] * tokens
            for trial, trial_rungs in zip(trials, rungs, strict=True)
        ]
        estimate = compare(np.stack(differences), tokens, clusters=clusters)
        if estimate.interval()[0] > 0:
            yield (
                f"after step {step} the held-out loss was lower by {estimate.difference:.4f} nats "
                f"a token than at the end, on {count} rows: shorter training may do better"
            )
        return
