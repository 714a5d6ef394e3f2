"""Answers do not depend on their batch, end where they should, and are scored as promised."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllama_lab.core.data import Example
from tinyllama_lab.core.generate import Generation, generate, measure_latency, write_generations
from tinyllama_lab.core.metrics.intent import intent_accuracy, read_intent
from tinyllama_lab.core.model import Base
from tinyllama_lab.trial import Trial

PROMPTS = ["a", "where is the airport", "how do I get to Pokhara by bus?", "visa"]


@pytest.fixture
def examples(tiny_base: Base) -> list[Example]:
    found = []
    for number, prompt in enumerate(PROMPTS):
        ids = tuple(tiny_base.tokenizer(prompt)["input_ids"])
        found.append(Example(ids, (True,) * len(ids), ids, prompt, f"answer {number}", "go"))
    return found


def alone(base: Base, example: Example, tokens: int) -> str:
    ids = torch.tensor([example.prompt_ids])
    write: Any = base.model.generate
    written = write(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens
    )
    text = base.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_greedy_answers_are_those_of_single_prompts(
    batch_size: int, tiny_base: Base, examples: list[Example]
) -> None:
    found = generate(tiny_base, examples, 12, batch_size)
    assert [g.output for g in found] == [alone(tiny_base, e, 12) for e in examples]
    assert len({g.output for g in found}) > 1
    assert [(g.prompt, g.reference, g.intent) for g in found] == [
        (e.prompt, e.reference, e.intent) for e in examples
    ]


def test_an_answer_ends_at_the_end_token(tiny_base: Base, examples: list[Example]) -> None:
    whole = generate(tiny_base, examples[1:2], 12)[0].output
    ids = tiny_base.tokenizer(whole)["input_ids"]
    tokenizer = copy.deepcopy(tiny_base.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[2])
    base = dataclasses.replace(tiny_base, tokenizer=tokenizer)
    cut = generate(base, examples[1:2], 12)[0].output
    assert len(cut) < len(whole) and whole.startswith(cut)


def test_no_more_tokens_are_written_than_asked_for(
    tiny_base: Base, examples: list[Example]
) -> None:
    for generation in generate(tiny_base, examples, 3):
        assert len(tiny_base.tokenizer(generation.output)["input_ids"]) <= 9  # 3 bytes, re-read


def test_latency_is_named_and_positive(tiny_base: Base, examples: list[Example]) -> None:
    found = measure_latency(tiny_base, examples[0], 4)
    assert found.keys() == {"perf/first_token_ms", "perf/decode_tokens_per_s"}
    assert all(value > 0 for value in found.values())


def test_the_file_keeps_every_letter(tmp_path: Path) -> None:
    generations = [Generation("नेपाल?", "a\nb", "\u2028 ü", "go")]
    write_generations(Trial(tmp_path), generations)
    lines = Trial(tmp_path).generations_file.read_text(encoding="utf-8").split("\n")
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
