"""Whether the recommended setting was trained long enough, from what it logged while it trained.

With `train.keep=best` it says which step was kept. There are two checks, each silent without
evidence:

- A straight line through the training loss of the last fifth of the steps. In the first pass over
  the data each step sees new rows, so the losses are independent and the usual standard error
  holds. A decaying learning rate flattens the end of every curve: longer training may help even
  if the line does not fall. After the first pass nothing is said, since a falling training loss
  may be rows learned by heart.
- The held-out loss in training (at rungs, or with `train.eval_every`) against that after the last
  step, by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import linregress

from tinyllama_lab.report.analysis.comparison import Scored
from tinyllama_lab.report.analysis.curves import step_losses
from tinyllama_lab.report.analysis.ranking import RankedCell
from tinyllama_lab.report.analysis.settings import MARGIN
from tinyllama_lab.report.analysis.statistics import ALPHA, Array, compare
from tinyllama_lab.study.events import read_events

LAST = 0.2  # the share of the steps through which the line is drawn
LEAST_STEPS = 10  # in that share; the slope of a line through fewer is too uncertain


def training_end(cells: Sequence[RankedCell]) -> Iterator[str]:
    """Yield notes on whether the chosen setting was trained too short or too long."""
    for chosen in (cell for cell in cells if cell.is_chosen):
        first = chosen.trials[0]
        if (first.settings.get("train.epochs") or 0) <= 1 and not _repeats_rows(first):
            yield from _still_falling([step_losses(t.row.trial) for t in chosen.trials])
        yield from _better_before(chosen.trials)
        yield from _kept(chosen)


def _repeats_rows(trial: Scored) -> bool:
    """Whether `train.max_steps` made the trial see rows more than once."""
    data = trial.row.result.data if trial.row.result else {}
    steps, batch = (trial.settings.get(f"train.{name}") for name in ("max_steps", "batch_size"))
    return bool(steps) and int(steps or 0) * int(batch or 1) > int(data.get("train_rows", 0))


def _still_falling(curves: Sequence[dict[int, float]]) -> Iterator[str]:
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    last = steps[-round(LAST * len(steps)) :] if steps else []
    if len(last) < LEAST_STEPS:
        return
    # the mean over seeds, so that a lucky order of rows in one run decides nothing
    line = linregress(last, [float(np.mean([curve[step] for curve in curves])) for step in last])
    fall = -line.slope * (last[-1] - last[0])
    if line.pvalue / 2 < ALPHA and fall > MARGIN:  # one-sided: only a fall is reported
        yield (
            f"the training loss was still falling by {-100 * line.slope:.2g} nats per 100 steps "
            f"(± {100 * line.stderr:.1g}) at the end: longer training may help"
        )


def _kept(chosen: RankedCell) -> Iterator[str]:
    """Yield which steps of the chosen setting `train.keep=best` kept."""
    trials, kept = chosen.trials, []
    for trial in trials:
        step = trial.metric("heldout/best_step")
        if trial.settings.get("train.keep") != "best" or step is None:
            return
        last = max(step_losses(trial.row.trial), default=0)
        kept.append(f"{step:.0f} of {last} (seed {trial.seed})")
    name = chosen.beside(chosen)
    yield f"train.keep=best kept the adapter of {name} after step {', '.join(kept)}"


def _rungs(trial: Scored) -> dict[int, Array]:
    """Return the loss of each row in training, nats per token, by optimizer step."""
    return {
        int(event["step"]): np.array(event["examples"], dtype=float)
        for event in read_events(trial.row.trial.events_file)
        if event.get("kind") in ("rung", "heldout") and event.get("examples")
    }


def _better_before(trials: Sequence[Scored]) -> Iterator[str]:
    """Yield a note if the model was better on the held-out rows at an earlier step.

    Args:
        trials: of one setting, a seed each; only steps at which all of them were scored count.
    """
    first = trials[0]
    if not first.measure.is_per_token or first.settings.get("train.keep") == "best":
        return
    rungs = [_rungs(trial) for trial in trials]
    last = min(max(step_losses(trial.row.trial), default=0) for trial in trials)
    # the last step is the end itself
    steps = {step for step in set.intersection(*map(set, rungs)) if step < last}
    for step in sorted(
        steps, key=lambda step: float(np.mean([trial_rungs[step].mean() for trial_rungs in rungs]))
    ):
        # a rung scores only the first of the held-out rows, so the end is compared on these
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
                f"a token than at the end, on {count} rows: shorter training, or train.keep=best, "
                "may do better"
            )
        return
