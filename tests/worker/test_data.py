"""From rows to tokens: what is supervised, the prompt of a generation, and what is left out."""

from __future__ import annotations

import copy
import dataclasses
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from tests.made_tokenizers import ZEPHYR
from tinyllama_lab.config.schema import DataConfig, part
from tinyllama_lab.core.dataset.dataset import DataCache, Encoder, Example, fingerprint
from tinyllama_lab.core.dataset.records import hub_records
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.data.formats.cells import UnusableRow
from tinyllama_lab.data.rows import RawRow, Turn
from tinyllama_lab.data.sources import content_digest
from tinyllama_lab.errors import DataChangedError, DataError

# its turns are closed by something that is not the end-of-sequence token
CLOSED = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# the number of turns stands in front: earlier text changes with every turn
REWRITING = "{{ messages|length }}" + CLOSED

ROW = RawRow("Where to?", "A map.", "To Pokhara.", "route", "", (), "")
TURNS = (
    Turn("user", "one"),
    Turn("assistant", "two"),
    Turn("user", "three"),
    Turn("assistant", "four"),
)
CHAT = dataclasses.replace(ROW, prompt="three", response="four", messages=TURNS)

STYLES = {
    "instruction_response": (
        "### Instruction:\nWhere to?\n\n### Context:\nA map.\n\n### Response:\n",
        "To Pokhara.",
    ),
    "query_intent_response": ("Query: Where to?\n", "Intent: route\nResponse: To Pokhara."),
    "chat": ("<|user|>Where to?\n\nA map.</s>\n<|assistant|>", "To Pokhara."),
}


@pytest.fixture
def tokenizer(tiny_base: Base) -> PreTrainedTokenizerBase:
    return copy.deepcopy(tiny_base.tokenizer)


@pytest.fixture
def settings(configure: Any) -> Any:
    def make(data: str = "travel", **changes: Any) -> DataConfig:
        changes = {"system": None, "max_length": 512, **changes}
        config = configure({f"data.{k}": v for k, v in changes.items()}, data)
        built: DataConfig = part(DataConfig, config["data"])
        return built

    return make


def encode(row: RawRow, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Example:
    return Encoder(tokenizer, data)(row)


def supervised_texts(example: Example | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the supervised runs of tokens as text."""
    assert example is not None
    pairs = zip(example.ids, example.loss_mask, strict=True)
    return [
        tokenizer.decode([i for i, _ in group])
        for supervised, group in groupby(pairs, key=lambda pair: pair[1])
        if supervised
    ]


@pytest.mark.parametrize("style", STYLES)
def test_response_and_end_are_supervised_and_the_prompt_is_not(
    style: str, settings: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    example = encode(ROW, settings(style=style), tokenizer)
    prompt, response = STYLES[style]
    assert example is not None
    assert supervised_texts(example, tokenizer) == [response + "</s>"]
    assert example.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(list(example.prompt_ids)) == prompt
    assert example.ids[: len(example.prompt_ids)] == example.prompt_ids
    asked = "Where to?" if style == "query_intent_response" else "Where to?\n\nA map."
    assert (example.reference, example.intent, example.prompt) == (response, "route", asked)
    assert example.labels == len(response) + 1


@pytest.mark.parametrize("style", STYLES)
def test_mask_all_supervises_every_token(
    style: str, settings: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    response, everything = (
        encode(ROW, settings(style=style, mask=mask), tokenizer) for mask in ("response", "all")
    )
    assert response is not None and everything is not None
    assert everything.ids == response.ids and all(everything.loss_mask)
    assert everything.labels == len(everything.ids) - 1  # nothing predicts the first
    assert fingerprint([everything]) != fingerprint([response])


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("template", [None, ZEPHYR])
def test_every_assistant_turn_of_a_chat_is_supervised(
    template: str | None, system: str | None, settings: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    example = encode(CHAT, settings(system=system), tokenizer)
    assert example is not None
    assert supervised_texts(example, tokenizer) == ["two</s>", "four</s>"]
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": turn.role, "content": turn.content} for turn in TURNS[:-1]]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(list(example.prompt_ids)) == prompt
    whole = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": "four"}], tokenize=False
    )
    assert (
        whole == tokenizer.decode(list(example.ids)) + "\n"
    )  # what follows </s> is not supervised


def test_zephyr_template_of_tinyllama(settings: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = ZEPHYR
    example = encode(ROW, settings(system="Guide."), tokenizer)
    assert example is not None
    assert tokenizer.decode(list(example.ids)) == (
        "<|system|>\nGuide.</s>\n<|user|>\nWhere to?\n\nA map.</s>\n<|assistant|>\nTo Pokhara.</s>"
    )
    assert supervised_texts(example, tokenizer) == ["To Pokhara.</s>"]


def test_a_template_that_closes_turns_otherwise_ends_with_the_end_token(
    settings: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = CLOSED
    texts = supervised_texts(encode(CHAT, settings(), tokenizer), tokenizer)
    assert texts == ["two[end]\n", "four[end]\n</s>"]


def test_a_tokenizer_without_a_template_is_refused(
    settings: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(
        DataError, match="got none in this model; set data.style=instruction_response"
    ):
        encode(CHAT, settings(), tokenizer)


def test_a_chat_whose_earlier_turns_are_rewritten_is_left_out(
    settings: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = REWRITING
    with pytest.raises(UnusableRow, match="set data.learn=last") as caught:
        encode(CHAT, settings(), tokenizer)
    assert caught.value.reason == "unaligned"


@pytest.mark.parametrize(("style", "count"), [("chat", 0), ("instruction_response", 1)])
def test_a_start_token_is_added_once_and_only_without_a_template(
    style: str, count: int, settings: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    start = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 257)])
    tokenizer.backend_tokenizer.post_processor = start
    example = encode(ROW, settings(style=style), tokenizer)
    assert example is not None and 257 not in example.ids[count:]
    assert example.ids[:count] == example.prompt_ids[:count] == (257,) * count


@pytest.mark.parametrize("mask", ["response", "all"])
def test_long_rows_lose_the_end_of_the_response_never_the_prompt(
    mask: str, settings: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = encode(ROW, settings(mask=mask), tokenizer)
    assert whole is not None
    prompt = len(whole.prompt_ids)
    cut = encode(ROW, settings(mask=mask, max_length=prompt + 3), tokenizer)
    assert cut is not None
    assert cut.ids == whole.ids[: prompt + 3] and cut.prompt_ids == whole.prompt_ids
    assert sum(cut.loss_mask[prompt:]) == 3
    assert cut.reference == whole.reference
    with pytest.raises(
        UnusableRow, match=f"takes {prompt} tokens; raise data.max_length"
    ) as caught:
        encode(ROW, settings(mask=mask, max_length=prompt), tokenizer)
    assert caught.value.reason == "too_long"


def test_the_fingerprint_depends_on_ids_masks_and_order() -> None:
    one = Example((1, 2, 3), (False, True, True), (1,), "p", "r", "")
    others = [
        [dataclasses.replace(one, ids=(1, 2, 4))],
        [dataclasses.replace(one, loss_mask=(False, False, True))],
        [one, one],
        [],
    ]
    prints = {fingerprint([one]), *(fingerprint(other) for other in others)}
    assert len(prints) == 5
    assert fingerprint([one]) == fingerprint([dataclasses.replace(one, prompt="other")])


def test_travel_rows_are_nested_and_apart(
    settings: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    cache = DataCache(tokenizer)
    few, many = cache.prepare(settings(n=8)), cache.prepare(settings(n=16))
    assert few.train == many.train[:8] and len(many.train) == 16
    assert few.heldout == many.heldout and len(few.heldout) == 4
    assert few.facts["eval_fingerprint"] == many.facts["eval_fingerprint"]
    assert few.facts["train_fingerprint"] != many.facts["train_fingerprint"]
    assert not {e.prompt for e in many.train} & {e.prompt for e in many.heldout}
    assert all(e.reference.startswith(f"Intent: {e.intent}\n") for e in many.train)
    assert few.facts["train_tokens"] == sum(len(e.ids) for e in few.train)
    assert few.facts["eval_label_tokens"] == sum(e.labels for e in few.heldout)
    assert cache.prepare(settings(n=8)) is few


def test_too_few_usable_rows_are_refused_with_their_number(
    tmp_path: Path, settings: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": f"question {n}", "response": "yes"} for n in range(20)]
    rows += [{"prompt": "long " * 200 + str(n), "response": "yes"} for n in range(5)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"data.n=100 needs 100 .* has 15: .*; 5 of these are"):
        DataCache(tokenizer).prepare(settings("file", path=str(path), n=100))
    enough = DataCache(tokenizer).prepare(settings("file", path=str(path), n=8))
    assert len(enough.train) == 8 and len(enough.heldout) == 4


# ---- data sets of the hub ------------------------------------------------------------------

README = """---
configs:
- {config_name: hinglish, data_files: [{split: train, path: hi/train.jsonl}]}
- {config_name: english, data_files: [{split: train, path: en.jsonl}]}
- config_name: both
  data_files: [{split: train, path: en.jsonl}, {split: validation, path: hi/train.jsonl}]
---
"""


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a data set with two configurations, as the client of the hub stores it."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "set" / "hi").mkdir(parents=True)
    for name, text in (("hi/train.jsonl", "kya"), ("en.jsonl", "what")):
        (tmp_path / "set" / name).write_text(json.dumps({"question": text, "response": "a"}))
    (tmp_path / "set" / "README.md").write_text(README)
    return tmp_path / "set"


def test_a_configuration_of_a_hub_set_is_read(snapshot: Path, settings: Any) -> None:
    data = settings("indicvault", config="hinglish")
    assert hub_records(data, snapshot) == [{"question": "kya", "response": "a"}]


def test_held_out_rows_come_from_a_split_of_their_own(snapshot: Path, settings: Any) -> None:
    data = settings("indicvault", config="both", eval_split="validation")
    assert hub_records(data, snapshot) == [{"question": "what", "response": "a"}]
    found = hub_records(data, snapshot, "eval_split")
    assert found == [{"question": "kya", "response": "a"}]
    data = settings("indicvault", config="both", eval_split="dev")
    with pytest.raises(DataError, match="got both and dev .*; set data.config or data.eval_split"):
        hub_records(data, snapshot, "eval_split")


@pytest.mark.parametrize("changes", [{"config": None}, {"config": "x"}, {"split": "dev"}])
def test_a_part_that_a_hub_set_lacks_is_named(
    snapshot: Path, settings: Any, changes: dict[str, Any]
) -> None:
    data = settings("indicvault", **{"config": "hinglish", **changes})
    with pytest.raises(DataError, match="data.config and data.split must name parts of maya"):
        hub_records(data, snapshot)


def test_data_that_changed_since_the_plan_is_refused(
    settings: Any, tiny_base: Base, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"prompt": f"q {n}", "response": "a"}) for n in range(40)]
    path.write_text("\n".join(rows))
    data = settings("file", path=str(path), n=4, eval_n=4)
    planned = dataclasses.replace(data, identity=content_digest(data))
    DataCache(tiny_base.tokenizer).prepare(planned)
    path.write_text("\n".join(rows[1:]))
    with pytest.raises(DataError, match="must stay as it was when the sweep was planned"):
        DataCache(tiny_base.tokenizer).prepare(planned)


def test_a_held_out_file_of_its_own_is_scored_and_none_of_it_trained_on(
    settings: Any, tiny_base: Base, tmp_path: Path
) -> None:
    for name, numbers in (("a", range(30)), ("b", range(25, 35))):
        rows = [json.dumps({"prompt": f"q {n}", "response": f"a {n}"}) for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    paths = {"path": str(tmp_path / "a.jsonl"), "eval_path": str(tmp_path / "b.jsonl")}
    data = settings("file", n="all", eval_n=10, **paths)
    planned = dataclasses.replace(data, identity=content_digest(data))
    found = DataCache(tiny_base.tokenizer).prepare(planned)
    assert {example.prompt for example in found.heldout} == {f"q {n}" for n in range(25, 35)}
    assert {example.prompt for example in found.train} == {f"q {n}" for n in range(25)}
    assert found.facts["dropped"] == {"in_heldout": 5} and found.facts["overlap_rows"] == 0
    (tmp_path / "b.jsonl").write_text("\n".join(rows[1:]))
    with pytest.raises(DataChangedError, match="must stay as it was when the sweep was planned"):
        DataCache(tiny_base.tokenizer).prepare(planned)
