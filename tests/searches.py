"""Searches for tests: the real driver and Optuna, with workers that train nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import grid
from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.data.travel.generate import PATH as TRAVEL
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import TrialFolder
from tinyllama_lab.sweep import run as sweep_run
from tinyllama_lab.sweep.execution import schedule
from tinyllama_lab.sweep.launchers import Workers
from tinyllama_lab.sweep.search.outcome import Outcome
from tinyllama_lab.sweep.search.run import run_search

SPACE = ("lora.r=choice(4,8,16,32)", "train.lr=tag(log,interval(1e-5,1e-2))")


def node(**settings: Any) -> dict[str, Any]:
    """`hydra.sweeper` as it is composed, with some settings changed."""
    found = yaml.safe_load((CONF_DIR / "hydra/sweeper/optuna.yaml").read_text())
    assert settings.keys() <= found.keys()
    return {**found, **settings}


def search(
    root: Path, workers: Workers, *typed: str, launcher: str = "local", **settings: Any
) -> Outcome:
    """Run a search in the study `s` below `root`."""
    patch = pytest.MonkeyPatch()
    patch.setattr(schedule, "POLL_S", 0)
    patch.setattr(sweep_run, "workers", lambda name, stopped: workers)
    patch.setattr(sweep_run, "_write_report", lambda plan, session: None)
    own = [text for text in grid.SMALL if not text.startswith("data=")]
    own += ["data=file", f"data.path={_few_rows(root)}", "data.columns.intent=intent"]
    shared = [*own, "tracking=none", "study=s", f"sweeps_dir={root}"]
    try:
        return run_search(
            [*shared, *(typed or SPACE)], node(**settings), grid.COMPOSER, launcher, root
        )
    finally:
        patch.undo()


def _few_rows(root: Path) -> Path:
    """Write rows beside the study: every driver reads its data, and the travel set is large."""
    file = root.with_name(f"{root.name}-rows.jsonl")
    if not file.exists():
        with TRAVEL.open() as lines:
            rows = [json.loads(line) for line in islice(lines, 64)]
        kept = [{name: row[name] for name in ("prompt", "response", "intent")} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return file


def trials(root: Path) -> list[TrialFolder]:
    """Every trial of the study."""
    return StudyFolder(root, "s").trials()


def states(root: Path) -> Iterator[str]:
    """How each of them ended."""
    for trial in trials(root):
        result, why = trial.read_result()
        yield str(result.state) if result else f"missing ({why})"
