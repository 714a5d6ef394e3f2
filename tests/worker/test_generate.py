"""Generations do not depend on their batch, end where they should, and have right scores."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.llamas import items_of
from tests.packs import Lab, after
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Engine
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation.generation import (
    Generation,
    generate,
    generations,
    write_generations,
)
from tinyllama_lab.core.evaluation.metrics.scores import intent_accuracy, read_intent
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.errors import StoppedError

PROMPTS = ["a", "where is the airport", "how do I get to Pokhara by bus?", "visa"]


@pytest.fixture
def examples(tiny_base: Base) -> list[Example]:
    found = []
    for number, prompt in enumerate(PROMPTS):
        ids = tuple(tiny_base.tokenizer(prompt)["input_ids"])
        found.append(Example(ids, (True,) * len(ids), ids, prompt, f"answer {number}", "go"))
    return found


@pytest.fixture(params=[PackedEngine, PeftEngine])
def make(request: Any) -> Callable[[Base], Engine[Any]]:
    kind: Callable[[Base], Engine[Any]] = request.param
    return kind


def answers(
    lab: Lab, make: Any, chosen: list[Example], tokens: int, max_concurrent: int = 32
) -> list[str]:
    items = items_of(None, chosen)
    return generate(make(lab.base), items, tokens, max_concurrent, lab.context())


def alone(base: Base, example: Example, tokens: int) -> str:
    ids = torch.tensor([example.prompt_ids])
    write: Any = base.model.generate
    written = write(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens
    )
    text = base.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text).strip()


@pytest.mark.parametrize("max_concurrent", [1, 3, 32])
def test_greedy_generations_equal_those_of_single_prompts(
    max_concurrent: int, lab: Lab, make: Any, examples: list[Example]
) -> None:
    found = answers(lab, make, examples, 12, max_concurrent)
    assert found == [alone(lab.base, e, 12) for e in examples]
    assert len(set(found)) > 1


def test_a_generation_is_returned_with_its_prompt(examples: list[Example]) -> None:
    found = generations(examples, ["w", "x", "y", "z"])
    assert [(g.prompt, g.reference, g.output, g.intent) for g in found] == [
        (e.prompt, e.reference, text, "go") for e, text in zip(examples, "wxyz", strict=True)
    ]
    with pytest.raises(ValueError):
        generations(examples, ["w"])


def test_an_answer_ends_at_the_end_token(lab: Lab, make: Any, examples: list[Example]) -> None:
    (whole,) = answers(lab, make, examples[1:2], 12)
    ids = lab.base.tokenizer(whole)["input_ids"]
    tokenizer = copy.deepcopy(lab.base.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[2])
    lab.base = dataclasses.replace(lab.base, tokenizer=tokenizer)
    (cut,) = answers(lab, make, examples[1:2], 12)
    assert len(cut) < len(whole) and whole.startswith(cut)


def test_no_more_tokens_are_written_than_asked_for(
    lab: Lab, make: Any, examples: list[Example]
) -> None:
    for answer in answers(lab, make, examples, 3):
        assert len(lab.base.tokenizer(answer)["input_ids"]) <= 9  # 3 bytes, re-read


def test_generation_stops_on_request(lab: Lab, make: Any, examples: list[Example]) -> None:
    with pytest.raises(StoppedError):
        items = items_of(None, examples)
        generate(make(lab.base), items, 2, 1, lab.context(after(2)))


@pytest.mark.parametrize("stop", [True, False])
def test_without_a_stop_all_tokens_are_written(
    stop: bool, lab: Lab, make: Any, examples: list[Example]
) -> None:
    (first,) = make(lab.base).generate(items_of(None, examples[:1]), 6, stop=False)
    tokenizer = copy.deepcopy(lab.base.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first[1])
    base = dataclasses.replace(lab.base, tokenizer=tokenizer)
    (found,) = make(base).generate(items_of(None, examples[:1]), 6, stop=stop)
    assert len(found) == (first.index(first[1]) + 1 if stop else 6)


def test_the_file_keeps_every_letter(tmp_path: Path) -> None:
    generations = [Generation("नेपाल?", "a\nb", "\u2028 ü", "go")]
    write_generations(tmp_path / "g.jsonl", generations)
    lines = (tmp_path / "g.jsonl").read_text(encoding="utf-8").split("\n")
    assert [Generation(**json.loads(line)) for line in lines[:-1]] == generations
    assert "नेपाल" in lines[0]


@pytest.mark.parametrize(
    ("answer", "intent"),
    [
        ("Intent: visa_fee\nResponse: 30 USD.", "visa_fee"),
        ("  \nIntent:   visa_fee", "visa_fee"),
        ("Intent:\nvisa_fee", None),
        ("The Intent: visa_fee", None),
        ("intent: visa_fee", None),
        ("", None),
    ],
)
def test_intent_is_read_from_the_first_line(answer: str, intent: str | None) -> None:
    assert read_intent(answer) == intent


def test_intent_accuracy_counts_answers_without_one_as_wrong() -> None:
    answers = ["Intent: a\nx", "Intent: b", "Intent: aa", "nothing"]
    assert intent_accuracy(answers, ["a", "b", "a", "a"]) == 0.5
