"""The driver finds in a model's files what the worker finds when it loads the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import grid
from tests.decoders import DECODERS, decoder
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.schema import Config
from tinyllama_lab.core.dataset.chat_template import ChatTemplate
from tinyllama_lab.core.models import tiny
from tinyllama_lab.core.models.loading import load_base, read_tokenizer
from tinyllama_lab.errors import LabError
from tinyllama_lab.sweep.settings.identify import Identifier
from tinyllama_lab.sweep.settings.model_files import model_problems

Change = Callable[[Path], Any]


def settings(file: str, **changes: Any) -> Change:
    """Change a JSON file; None removes a key."""

    def change(folder: Path) -> None:
        path = folder / file
        content = {**(json.loads(path.read_text()) if path.is_file() else {}), **changes}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def added(token: str, number: int) -> Change:
    """Add a token to the tokenizer, and no row to the embedding."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["added_tokens"].append({**content["added_tokens"][-1], "id": number})
        content["added_tokens"][-1]["content"] = token
        path.write_text(json.dumps(content))

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


TOKENIZER, CONFIG = "tokenizer_config.json", "config.json"
REFUSED: dict[str, tuple[Change, str]] = {
    "no end of sequence": (
        settings(TOKENIZER, eos_token=None),
        'got none in {}; name the token that ends a text as "eos_token" in {}/tokenizer_config',
    ),
    "an older tokenizer without an end": (
        settings(TOKENIZER, eos_token=None, tokenizer_class="PreTrainedTokenizerFast"),
        "a tokenizer needs an end-of-sequence token, got none in {}",
    ),
    "a token too many": (added("<|extra|>", 260), "got 261 tokens and an embedding of 260 rows"),
    "padding beyond the embedding": (
        settings(CONFIG, pad_token_id=300),
        "pad_token_id must be a row of the embedding, got 300 and 260 rows; correct it in {}",
    ),
}
TAKEN: dict[str, Change] = {
    "as it was": lambda folder: None,
    "code beside a known architecture": settings(CONFIG, auto_map={"AutoConfig": "evil.Config"}),
    "an end in an older file": both(
        settings(TOKENIZER, eos_token=None), settings("special_tokens_map.json", eos_token="</s>")
    ),
    "a template in an older file": both(
        lambda folder: (folder / "chat_template.jinja").unlink(),
        settings(TOKENIZER, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"),
    ),
    "a token for images": both(
        added("<image>", 260), settings(TOKENIZER, image_token="<image>")
    ),
}  # fmt: skip


def changed(tmp_path: Path, change: Change) -> Config:
    folder = tmp_path / "m"
    shutil.copytree(tiny.folder(), folder)
    change(folder)
    return local(folder)


def local(folder: Path) -> Config:
    loaded = config.load(
        grid.plain(*grid.SMALL, "model=local", f"model.path={folder}", "quant=none")
    )
    return replace(loaded, model=replace(loaded.model, identity="1"))


def load(of: Config) -> None:
    """Load the base, and the chat template as the first row would."""
    base = load_base(of.model, of.quant, "fp32", "cpu")
    ChatTemplate(base.tokenizer)


@pytest.mark.parametrize("name", REFUSED)
def test_the_driver_refuses_with_the_words_of_the_worker(name: str, tmp_path: Path) -> None:
    change, says = REFUSED[name]
    of = changed(tmp_path, change)
    (problem,) = model_problems(of.model, of.data)
    assert says.replace("{}", str(of.model.path)) in problem
    identify = Identifier()
    identify(of)
    assert identify.problems == [problem]
    with pytest.raises(LabError) as caught:
        load(of)
    (said,) = caught.value.problems
    assert said.partition(", got")[0] == problem.partition(", got")[0]
    assert said.rpartition("; ")[2] == problem.rpartition("; ")[2]


@pytest.mark.parametrize("name", TAKEN)
def test_the_driver_takes_what_the_worker_takes(name: str, tmp_path: Path) -> None:
    of = changed(tmp_path, TAKEN[name])
    assert model_problems(of.model, of.data) == []
    load(of)


@pytest.mark.parametrize(
    "change",
    [
        settings(TOKENIZER, eos_token=None, tokenizer_class="LlamaTokenizer"),  # has one itself
        both(settings(TOKENIZER, eos_token=None), settings(CONFIG, model_type="qwen2")),
        both(added("<|extra|>", 260), settings(CONFIG, model_type="mixtral")),
        settings(CONFIG, model_type=None),
    ],
)
def test_what_the_files_do_not_show_for_certain_is_left_to_the_worker(
    change: Change, tmp_path: Path
) -> None:
    of = changed(tmp_path, change)
    assert model_problems(of.model, of.data) == []


def test_no_template_is_needed_where_prompts_are_plain_or_not_known_yet(tmp_path: Path) -> None:
    of = changed(tmp_path, lambda folder: (folder / "chat_template.jinja").unlink())
    columns = of.data.columns
    chats = replace(of.data, columns=replace(columns, messages="m", prompt=None, response=None))
    (problem,) = model_problems(of.model, chats)
    assert problem.endswith("save a template with the tokenizer of this one")
    unread = replace(columns, prompt=None, response=None, messages=None)
    for data in (
        of.data,  # its prompts may be chats, which need another model, or texts
        replace(of.data, style="instruction_response"),
        replace(of.data, columns=unread),
        replace(of.data, columns=replace(unread, text="t")),
    ):
        assert model_problems(of.model, data) == []


@pytest.mark.parametrize("name", DECODERS)
def test_driver_and_worker_agree_on_every_architecture(name: str, tmp_path: Path) -> None:
    """Qwen2 and Phi-3 take another class of tokenizer, in which the worker may find more."""
    decoder(name, vocab_size=260).save_pretrained(tmp_path / "saved")
    shutil.copytree(tiny.folder(), tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    for file in (tmp_path / "saved").iterdir():
        shutil.copy(file, tmp_path / "m")
    changes = {**{key: change for key, (change, _) in REFUSED.items()}, **TAKEN}
    for number, (key, change) in enumerate(changes.items()):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "m", folder)
        change(folder)
        of = local(folder)
        problems = model_problems(of.model, of.data)
        try:
            ChatTemplate(read_tokenizer(of.model)[0])
        except LabError as error:
            rules = [problem.partition(", got")[0] for problem in problems]
            is_same = rules == [str(error).partition(", got")[0]]
            assert is_same or name in ("qwen2", "phi3"), f"{key}: {error}"
        else:
            assert problems == [], key
