"""A model that was trained whole: it is merged and answers; what needs an adapter refuses it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.packs import QUIET
from tinyllama_lab.config.lora import full_tuning, plain_lora
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.models.trained import load_adapter
from tinyllama_lab.deploy.completer import PeftCompleter, Request, completer
from tinyllama_lab.deploy.export import Wanted, deploy
from tinyllama_lab.deploy.gguf_lora import check_adapter
from tinyllama_lab.deploy.merge import merge
from tinyllama_lab.deploy.push import push
from tinyllama_lab.errors import ModelError, StudyError
from tinyllama_lab.study.trial import TrialFolder

PROMPT = tuple(range(5, 19))


@pytest.fixture(scope="module")
def trained(another_lab: Any) -> TrialFolder:
    """Return a trial that trained all weights."""
    settings = {"lora.variant": "full", "train.max_steps": 3, "train.lr": 1e-2}
    trial: TrialFolder = another_lab.trial({**QUIET, **settings})
    another_lab.run([trial])
    return trial


@pytest.fixture(scope="module")
def model(trained: TrialFolder) -> Any:
    """Return what transformers alone loads."""
    return AutoModelForCausalLM.from_pretrained(trained.adapter_dir).eval()


@torch.no_grad()
def greedy(model: Any, tokens: int, ends: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([PROMPT])
    for _ in range(tokens):
        chosen = model(ids).logits[0, -1].argmax()
        if int(chosen) in ends:
            break
        ids = torch.cat([ids, chosen[None, None]], dim=1)
    return ids[0, len(PROMPT) :].tolist()


def test_merging_writes_the_trained_weights(
    trained: TrialFolder, model: Any, tmp_path: Path
) -> None:
    merge(trained, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = merged.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert merged.generation_config.eos_token_id


def test_it_answers_beside_the_bare_base(
    trained: TrialFolder, model: Any, tiny_base: Base
) -> None:
    base: Any = tiny_base.model
    bare = greedy(base, 9, tiny_base.end_ids)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    made = completer(tiny_base, full_tuning())
    assert isinstance(made, PeftCompleter)
    assert not isinstance(completer(tiny_base, plain_lora(1, "mlp")), PeftCompleter)
    made.load("full", trained)
    begun = {name: made.begin(Request(name, PROMPT, 9)) for name in (None, "full")}
    while not made.is_idle:
        made.step()
    assert begun[None].ids == bare
    assert begun["full"].ids == greedy(model, 9, tiny_base.end_ids) != bare
    with pytest.raises(StudyError, match=f"start again with trial={trained.key}"):
        made.load("again", trained)
    assert made._copies is not None
    made._copies.remove()
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())


def test_it_is_measured_as_trained_and_merged(trained: TrialFolder) -> None:
    of_trial = SimpleNamespace(row=SimpleNamespace(trial=trained))
    selection: Any = SimpleNamespace(trial=of_trial, study=None)
    rows, problems = deploy(selection, Wanted([], "f16", False), "cpu", lambda line: None)
    assert not problems
    assert [row.form for row in rows] == ["base", "adapter", "merged"]
    assert rows[2].difference == pytest.approx(0, abs=1e-4)
    assert abs(rows[0].difference or 0) > 1e-2


def test_what_needs_an_adapter_says_what_to_do_instead(trained: TrialFolder) -> None:
    selection: Any = SimpleNamespace(trial=SimpleNamespace(row=SimpleNamespace(trial=trained)))
    with pytest.raises(StudyError, match=r"trained the whole model; type AutoModelForCausalLM\."):
        load_adapter(trained, "cpu")
    with pytest.raises(ModelError, match="holds a whole model; set types=f16"):
        check_adapter(trained.adapter_dir)
    with pytest.raises(StudyError, match="merge it to a folder, and upload that with: hf upload"):
        push(selection, "owner/name", True, "", print)
