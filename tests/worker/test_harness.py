"""Tasks of lm-evaluation-harness: they get the saved adapter; failures and missing packages."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import grid
from tests.packs import QUIET, Lab, quickly, result
from tinyllama_lab.config import schema as config
from tinyllama_lab.core.evaluation import harness
from tinyllama_lab.errors import DataError
from tinyllama_lab.study.trial import State
from tinyllama_lab.sweep.settings.identify import Identifier

pytestmark = pytest.mark.usefixtures("dora_alone")

IDS = torch.tensor([[1, 5, 9, 7, 3]])


class FakeHarness(ModuleType):
    """Scores the likelihood of a row of tokens; knows the task `likely` only."""

    def __init__(self) -> None:
        super().__init__("lm_eval")
        self.models: list[Any] = []

    def simple_evaluate(self, model: Any, tasks: list[str], **settings: Any) -> dict[str, Any]:
        if tasks != ["likely"]:
            raise KeyError(tasks[0])
        self.models.append(model)
        with torch.no_grad():
            loss = float(model.pretrained(input_ids=IDS, labels=IDS).loss)
        scores = {"alias": "likely", "loss,none": loss, "loss_stderr,none": "N/A", "em,strict": 1}
        return {"results": {"likely": scores}}


class HFLM:
    """Records its arguments."""

    def __init__(self, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
        self.pretrained, self.tokenizer = pretrained, tokenizer


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHarness:
    made, models = FakeHarness(), ModuleType("lm_eval.models.huggingface")
    models.HFLM = HFLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", made)
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", models)
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def test_base_and_adapters_run_the_configured_tasks(lab: Lab, fake: FakeHarness) -> None:
    changes = {**QUIET, "eval.harness": ["likely"], "train.lr": 1e-2}
    trials = [lab.trial({**changes, "seed": seed}) for seed in (0, 1)]
    found = [each.metrics for each in lab.run(trials)]
    bare = result(lab.base_trial(trials[0])).metrics
    with torch.no_grad():
        expected = float(lab.base.model(input_ids=IDS, labels=IDS).loss)
    assert bare["harness/likely/loss"] == pytest.approx(expected)
    losses = [each["harness/likely/loss"] for each in found]
    assert len({*losses, expected}) == 3 and found[0]["harness/likely/em_strict"] == 1
    assert not any("stderr" in name for name in found[0])
    again = harness.task_scores(lab.base, trials[1].adapter_dir, ["likely"])
    assert again["harness/likely/loss"] == pytest.approx(losses[1])
    assert not hasattr(lab.base.model, "peft_config")


def test_an_unavailable_task_fails_its_trial(lab: Lab, fake: FakeHarness) -> None:
    good = lab.trial(QUIET)
    bad = lab.trial({**QUIET, "eval.harness": ["nowhere"]})
    lab.run([good, bad])
    error = result(bad).error
    assert result(good).state is State.DONE and error is not None
    assert "must name tasks that lm-eval can load, got nowhere" in error["message"]


def test_trials_through_peft_skip_the_tasks_with_a_note(lab: Lab, fake: FakeHarness) -> None:
    trial = lab.trial({**QUIET, "eval.harness": ["likely"], "lora.variant": "dora"})
    (found,) = lab.run([trial])
    assert found.state is State.DONE
    assert not any(name.startswith("harness/") for name in found.metrics)
    expected = "eval.harness was skipped: it needs adapters that can be packed, got peft ("
    assert expected in trial.events_file.read_text()


def test_without_the_package_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch, lab: Lab, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DataError, match="eval.harness needs the package lm-eval"):
        harness.task_scores(lab.base, None, ["likely"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    identify = Identifier()
    asked = ("model=tiny_random", "data=travel", "eval.harness=[arc_easy]")
    identify(config.load(grid.plain(*asked)))
    assert any("eval.harness=arc_easy needs the package" in text for text in identify.problems)
    identify = Identifier()
    identify(config.load(grid.plain(*asked, "quant=int8")))
    (problem,) = identify.problems
    assert "can be packed, got quant=int8; set eval.harness=[]" in problem
