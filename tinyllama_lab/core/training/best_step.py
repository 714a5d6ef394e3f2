"""Held-out losses while an adapter trains: its best step, and whether training ends early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from tinyllama_lab.config.schema import TrainConfig
from tinyllama_lab.core.engines.base import ADAPTER_BYTES, Adapter
from tinyllama_lab.core.evaluation.losses import ExampleLoss, mean_loss
from tinyllama_lab.core.training.optimizer import values_of
from tinyllama_lab.study.evaluations import checks_every
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.trial import TrialFolder

FOLDS = 10  # of the held-out rows, each scored with the step that the others choose


@dataclass(frozen=True)
class Check:
    """The held-out loss after a step."""

    step: int
    loss: float  # nats per label token
    rows: list[float]  # the loss of every row, nats


class BestStep:
    """The held-out losses of one trial while it trains, and its values after the best step."""

    def __init__(self, trial: TrialFolder, settings: TrainConfig, steps: int) -> None:
        """`steps` is how many there are unless training ends early."""
        self._log = EventLog(trial.events_file)
        self._settings, self._steps = settings, steps
        self._every = checks_every(vars(settings), steps)
        self._checks: list[Check] = []
        # of every held-out row: its label tokens and the number of its cluster
        self._tokens: list[int] = []
        self._clusters: list[int] = []
        # on the host, where they take nothing of a GPU's memory; None where the last step counts
        self._values: list[torch.Tensor] | None = None

    def is_due(self, step: int) -> bool:
        """Return whether the held-out loss is wanted after this step, and not known yet."""
        if self._every is None or not step or (self._checks and self._checks[-1].step >= step):
            return False
        return step % self._every == 0 or step >= self._steps

    def note(self, step: int, losses: Sequence[ExampleLoss], adapter: Adapter) -> None:
        """Take the held-out loss after a step, and the adapter's values if it is the lowest."""
        loss, before = mean_loss(losses), self._best
        self._checks.append(Check(step, loss, [each.loss for each in losses]))
        self._tokens = [each.tokens for each in losses]
        self._clusters = [each.cluster for each in losses]
        if self._settings.keep == "best" and self._best is not before:
            self._values = [value.detach().to("cpu", copy=True) for value in adapter.parameters]
        self._log.append(
            "heldout",
            step=step,
            values={"heldout/loss": loss},
            examples=[round(each.loss / each.tokens, 6) for each in losses],
        )
        if self.is_over:
            best = self._best.step if self._best else "an earlier one"
            self._log.append(
                "note",
                text=f"training ended after step {step} of {self._steps} (train.patience): the "
                f"held-out loss was lower after step {best}",
            )

    @property
    def curve(self) -> dict[int, float]:
        """Return the losses by step, nats per label token."""
        return {check.step: check.loss for check in self._checks}

    @property
    def _best(self) -> Check | None:
        """The first check with the lowest loss; None if no loss is a number."""
        finite = [check for check in self._checks if np.isfinite(check.loss)]
        return min(finite, key=lambda check: check.loss, default=None)

    @property
    def is_over(self) -> bool:
        """Return whether the last `train.patience` losses were not lower than one before them."""
        patience = self._settings.patience
        if patience is None or (best := self._best) is None:
            return False
        if self._checks[-1].step >= self._steps:
            return False
        return sum(check.step > best.step for check in self._checks) >= patience

    def restore_best(self, adapter: Adapter) -> None:
        """Give an adapter its values after the best step, if these are to be kept."""
        if self._values is None:
            return
        copy_values(self._values, adapter)
        self._values = None

    def tensors(self, adapter: Adapter) -> dict[str, torch.Tensor]:
        """Return what a checkpoint stores beside `facts`."""
        named = adapter.named(self._values) if self._values is not None else {}
        return {f"best.{name}": value for name, value in named.items()}

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint stores as JSON."""
        checks = [asdict(check) for check in self._checks]
        return {"checks": checks, "tokens": self._tokens, "clusters": self._clusters}

    def restore(
        self, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], adapter: Adapter
    ) -> None:
        """Continue from what `facts` and `tensors` have returned."""
        self._checks = [Check(**check) for check in facts.get("checks", ())]
        self._tokens, self._clusters = facts.get("tokens", []), facts.get("clusters", [])
        is_stored = any(name.startswith("best.") for name in tensors)
        values = values_of(adapter, tensors, "best") if is_stored else None
        self._values = values and [value.cpu() for value in values]

    def metrics(self, is_scored: bool) -> dict[str, float]:
        """Return the metrics of a trained trial.

        Args:
            is_scored: whether the trial is scored on the rows that chose its step.
        """
        if (best := self._best) is None:
            return {}
        metrics = {"heldout/best_step": float(best.step)}
        if self._settings.keep == "best" and is_scored and len(set(self._clusters)) > 1:
            metrics["heldout/optimism"] = self._optimism()
        return metrics

    def _optimism(self) -> float:
        """Return by how much the choice of the step lowers the loss on the rows that made it.

        Cross-validation, nats per label token: every fold of the rows is scored after the step
        that the other folds choose. Rows of one cluster are in one fold.
        """
        losses = np.array([check.rows for check in self._checks if np.isfinite(check.loss)])
        clusters = np.unique(self._clusters, return_inverse=True)[1]
        folds = clusters % min(FOLDS, clusters.max() + 1)
        unseen = 0.0
        for fold in np.unique(folds):
            chosen = losses[:, folds != fold].sum(axis=1).argmin()
            unseen += losses[chosen, folds == fold].sum()
        return float(unseen - losses.sum(axis=1).min()) / sum(self._tokens)


def copy_values(values: Sequence[torch.Tensor], adapter: Adapter) -> None:
    """Give an adapter these values, in the order of its parameters."""
    with torch.no_grad():
        for parameter, value in zip(adapter.parameters, values, strict=True):
            # in place: the optimizer, and the views of a packed adapter, refer to this storage
            parameter.copy_(value)
    adapter.updated()


def mib_with_best(adapter_mib: float, settings: TrainConfig, device: torch.device) -> float:
    """Return what an adapter takes in training, with its values after the best step on a CPU."""
    is_kept = settings.keep == "best" and device.type == "cpu"
    return adapter_mib * (1 + 4 / ADAPTER_BYTES) if is_kept else adapter_mib  # in float32
