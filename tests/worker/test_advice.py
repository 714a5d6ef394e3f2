"""Messages about long rows: following their advice ends in training, without a circle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import grid
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.models import tiny
from tinyllama_lab.core.models.loading import read_tokenizer
from tinyllama_lab.core.training.prepare import prepare
from tinyllama_lab.errors import LabError
from tinyllama_lab.sweep.plan import check_cells

_SETTING = re.compile(r"(?:set|type) ((?:[a-z_.]+=[^\s,;]+ ?)+)")
_MOST = 6  # commands, one after another


def model_folder(folder: Path, positions: int = 2048, has_template: bool = True) -> Path:
    """The tiny Llama with other positions, or without a chat template."""
    shutil.copytree(tiny.folder(), folder)
    path = folder / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "max_position_embeddings": positions})
    )
    if not has_template:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        path = folder / "tokenizer_config.json"
        path.write_text(
            json.dumps(
                {k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}
            )
        )
    return folder


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(words: Sequence[int], name: str = "x") -> list[dict[str, Any]]:
    """Prompts of so many bytes."""
    return [
        {"prompt": f"{name}{n:03d}" + "p" * count, "response": f"answer {n}"}
        for n, count in enumerate(words)
    ]


def chats(count: int, name: str = "x", **more: Any) -> list[dict[str, Any]]:
    turns = ("user", "assistant")
    return [
        {"messages": [{"role": r, "content": f"{name} {r} {n}"} for r in turns], **more}
        for n in range(count)
    ]


def refusal(typed: dict[str, str]) -> str:
    """Why a command would not train, from the driver or from the worker; empty where it would."""
    texts = [f"{key}={value}" for key, value in typed.items()]
    try:
        (found,) = check_cells([grid.COMPOSER(texts)])
        prepare(DataCache(*read_tokenizer(found.model)), found.data, found.eval)
    except LabError as error:
        return str(error)
    return ""


def follow(*typed: str) -> list[str]:
    """The refusals that a user gets who types what each says, up to the last one."""
    command = dict(text.split("=", 1) for text in typed)
    asked, said = [command], []
    while (text := refusal(command)) and len(said) < _MOST:
        said.append(text)
        advice = _SETTING.search(text)
        if advice is None:
            return said
        command = command | dict(each.split("=", 1) for each in advice[1].split())
        assert command not in asked, f"{advice[0]} was typed before: {said}"
        asked.append(command)
    assert len(said) < _MOST, said
    return said


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    folder = model_folder(tmp_path / "small", positions=64)
    return ["model=local", f"model.path={folder}", "data=file", "eval.latency_tokens=0"]


def test_prompts_that_fit_no_length_are_reported_at_once(tmp_path: Path, small: list[str]) -> None:
    path = written(tmp_path / "a.jsonl", pairs([200] * 60))
    said = follow(*small, f"data.path={path}", "eval.max_new_tokens=8")
    assert len(said) == 1 and "take a model with more than 64 positions" in said[0]
    again = follow(*small, f"data.path={path}", "eval.max_new_tokens=8", "data.max_length=64")[-1]
    assert "raise data.max_length" not in again
    assert "its prompt takes" in again and "shorten the prompts" in again


def test_following_the_advice_trains_if_some_prompts_fit(tmp_path: Path, small: list[str]) -> None:
    path = written(tmp_path / "a.jsonl", pairs([200] * 5 + [4] * 80))
    said = follow(*small, f"data.path={path}", "eval.max_new_tokens=8")
    assert "set data.max_length=64, which leaves out" in said[0] and len(said) <= 2


def test_following_the_advice_on_answer_length_trains(tmp_path: Path, small: list[str]) -> None:
    path = written(tmp_path / "a.jsonl", pairs([20] * 60))
    for asked in ("eval.max_new_tokens=60", "eval.max_new_tokens=64"):
        said = follow(*small, f"data.path={path}", "data.max_length=64", asked)
        assert said and "set eval.max_new_tokens=" in said[-1]


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [(64, [4] * 80), (64, [4] * 80 + [90] * 20), (128, [95] * 60), (128, [95] * 60 + [200] * 20)],
)
def test_all_values_that_fit_few_positions_are_named_at_once(
    tmp_path: Path, positions: int, lengths: list[int]
) -> None:
    folder = model_folder(tmp_path / "few", positions)
    rows = [{**row, "response": "a" * 70} for row in pairs(lengths)]
    path = written(tmp_path / "a.jsonl", rows)
    said = follow("model=local", f"model.path={folder}", "data=file", f"data.path={path}")
    assert len(said) == 1 and f"the model's {positions} positions" in said[0], said
    values = ("data.max_length", "eval.max_new_tokens", "eval.latency_tokens")
    assert all(f"{name}=" in said[0] for name in values), said


@pytest.mark.parametrize("kind", ["messages", "prompts as messages", "a system column"])
def test_chats_without_a_chat_template_are_not_sent_to_another_style(
    tmp_path: Path, kind: str
) -> None:
    folder = model_folder(tmp_path / "plain", has_template=False)
    rows = chats(60)
    if kind == "prompts as messages":
        rows = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in rows]
    if kind == "a system column":
        rows = [{**row, "system": "Be brief."} for row in pairs([4] * 60)]
    path = written(tmp_path / "a.jsonl", rows)
    (said,) = follow("model=local", f"model.path={folder}", "data=file", f"data.path={path}")
    assert "data.style" not in said and "take a model that was made for chats" in said


def test_prompts_without_a_chat_template_are_sent_to_plain_text(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "plain", has_template=False)
    path = written(tmp_path / "a.jsonl", pairs([4] * 60))
    (said,) = follow("model=local", f"model.path={folder}", "data=file", f"data.path={path}")
    assert "set data.style=instruction_response" in said


@pytest.mark.parametrize("swapped", [False, True])
def test_a_held_out_file_of_another_form_is_named_with_the_form_that_is_wanted(
    tmp_path: Path, swapped: bool
) -> None:
    both = [
        written(tmp_path / "a.jsonl", pairs([4] * 60)),
        written(tmp_path / "b.jsonl", chats(9)),
    ]
    train, held_out = reversed(both) if swapped else both
    (said,) = follow(
        "model=tiny_random", "data=file", f"data.path={train}", f"data.eval_path={held_out}"
    )
    wanted = "messages" if swapped else "prompt, response"
    assert f"with the columns {wanted}" in said and "rename" not in said
