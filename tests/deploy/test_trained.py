"""Prompts in the format of training, also where only the data says what that is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tinyllama_lab.core.models import tiny
from tinyllama_lab.deploy.trained import prompt_format
from tinyllama_lab.errors import DataError
from tinyllama_lab.study.trial import Result, State, TrialFolder, trial_key

ROWS = [f"Guest {n} books room {n * 7} in town {n * 3}, near lake {n * 5}." for n in range(60)]
ASKED = [{"role": "user", "content": "Guest 7 books"}]


@pytest.fixture
def trial(tmp_path: Path, configure: Any) -> TrialFolder:
    """A trial whose configuration leaves the columns open, as it does for a set of the hub."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    config = configure({"data.path": str(file)}, data="file")
    assert config["data"]["style"] == "chat"
    trial = TrialFolder(tmp_path / "trials" / f"r4-{trial_key(config)}")
    trial.write_config(config)
    return trial


def prompts(trial: TrialFolder) -> tuple[list[int], str]:
    """The prompt of `chat`, and what the template of `merge` renders."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder())
    trained = prompt_format(trial, tokenizer)
    tokenizer.chat_template = trained.template()
    rendered = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    return trained.prompt(ASKED), str(rendered)


def test_a_result_says_that_its_rows_were_ready_made_text(trial: TrialFolder, lab: Any) -> None:
    lab.run([trial])
    result, _ = trial.read_result()
    assert result is not None and result.data["style"] == "text"
    Path(trial.read_config()["data"]["path"]).unlink()  # no longer needed
    ids, rendered = prompts(trial)
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder())
    assert ids == tokenizer("Guest 7 books", add_special_tokens=False)["input_ids"]
    assert rendered == "Guest 7 books"


def test_without_that_fact_the_rows_are_read_again_or_the_command_is_refused(
    trial: TrialFolder,
) -> None:
    trial.commit(Result(trial.key, trial.name, State.DONE))  # as earlier versions wrote it
    assert prompts(trial)[1] == "Guest 7 books"
    Path(trial.read_config()["data"]["path"]).unlink()
    with pytest.raises(DataError, match="rows.jsonl"):
        prompts(trial)
