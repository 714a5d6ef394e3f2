"""Greedy generations of many adapters together equal those of transformers for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.llamas import (
    LLAMA3,
    Words,
    base_of,
    example,
    items_of,
    llama,
    make_b_random,
    settings,
    worn,
)
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed import decode as decoding
from tinyllama_lab.core.engines.packed.adapter import PackedAdapter
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models.loading import Base

TOKENS = 14
CONFIGS = [settings(), settings(r=2, targets="attention_qv")]
PROMPTS = [example(length, prompt=length) for length in (9, 1, 40, 10, 3, 9)]
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "as many keys as queries": {"num_key_value_heads": 4},
    "wide heads, llama3": {"head_dim": 12, "rope_parameters": LLAMA3},
}


def transformers_answers(
    model: Any, prompts: Sequence[Example], tokens: int, end: int | None
) -> list[list[int]]:
    """Generate with transformers, one prompt at a time."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt.prompt_ids])
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=end,
        )
        answers.append(written[0, ids.shape[1] :].tolist())
    return answers


class Writers:
    """The base and two adapters that change its generations, in one engine."""

    def __init__(self, mixed: bool = True, **shape: Any) -> None:
        self.base: Base = base_of(llama(**shape))
        self.engine = PackedEngine(self.base, mixed=mixed)
        self.adapters: list[PackedAdapter] = []
        for seed, config in enumerate(CONFIGS):
            self.adapters.append(self.engine.add(config, seed))
            make_b_random(self.adapters[-1], seed, scale=0.3)

    @property
    def items(self) -> list[WorkItem[Any]]:
        return [item for a in (None, *self.adapters) for item in items_of(a, PROMPTS)]

    def write(self, end: int | None, tokens: int = TOKENS) -> list[list[int]]:
        self.base.tokenizer = Words(-1 if end is None else end)  # type: ignore[assignment]
        return self.engine.generate(self.items, tokens, stop=end is not None)

    def expected(self, end: int | None, tokens: int = TOKENS) -> list[list[int]]:
        model: PreTrainedModel = self.base.model
        answers = transformers_answers(model, PROMPTS, tokens, end)
        for config, adapter in zip(CONFIGS, self.adapters, strict=True):
            with worn(self.base, config, adapter) as adapted:
                answers += transformers_answers(adapted, PROMPTS, tokens, end)
        return answers


@pytest.fixture(scope="module")
def writers() -> Writers:
    return Writers()


@pytest.fixture(scope="module")
def end(writers: Writers) -> int:
    """Return a token that ends many generations, at as many different positions as possible."""
    answers = writers.write(None)
    words = {token for answer in answers for token in answer}
    ends = {word: {a.index(word) for a in answers if word in a} for word in words}
    best = max(sorted(words), key=lambda word: len(ends[word]))
    assert len(ends[best]) > 3 and not all(best in answer for answer in answers)
    return best


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mixed", [True, False])
def test_generations_equal_those_of_transformers(mixed: bool, shape: dict[str, Any]) -> None:
    writers = Writers(mixed, **shape)
    found = writers.write(None)
    assert found == writers.expected(None)
    assert all(len(answer) == TOKENS for answer in found)
    count = len(PROMPTS)
    assert found[:count] != found[count : 2 * count] != found[2 * count :] != found[:count]


def test_generations_end_where_those_of_transformers_end(writers: Writers, end: int) -> None:
    found = writers.write(end)
    assert found == writers.expected(end)
    assert all(answer.index(end) == len(answer) - 1 for answer in found if end in answer)
    assert len({len(answer) for answer in found}) > 3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.1])
def test_removing_finished_rows_changes_no_generation(
    share: float, writers: Writers, end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = writers.write(end)
    monkeypatch.setattr(decoding, "COMPACT_BELOW", share)
    assert writers.write(end) == expected


def test_finished_rows_are_removed(
    writers: Writers, end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = decoding.Decoder.step

    def watched(decoder: decoding.Decoder, ids: torch.Tensor) -> None:
        sizes.append(len(ids))
        step(decoder, ids)

    monkeypatch.setattr(decoding.Decoder, "step", watched)
    writers.write(end)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_without_a_stop_token_exactly_the_maximum_is_generated(
    tokens: int, writers: Writers, end: int
) -> None:
    whole = writers.write(None)
    assert writers.write(None, tokens) == [answer[:tokens] for answer in whole]
    cut = writers.write(end, tokens)
    assert all(len(answer) <= tokens for answer in cut)
    assert [answer for answer in cut if end not in answer] == [
        answer[:tokens] for answer in whole if end not in answer[:tokens]
    ]


def test_a_generation_does_not_depend_on_the_others_of_its_batch(writers: Writers) -> None:
    together = writers.write(None)
    alone = [writers.engine.generate([item], TOKENS, stop=False)[0] for item in writers.items]
    assert together == alone


def test_a_long_prompt_takes_the_branch_for_long_sequences(writers: Writers) -> None:
    prompts = [example(length, prompt=length) for length in (280, 5)]
    items = items_of(writers.adapters[0], prompts)
    with worn(writers.base, CONFIGS[0], writers.adapters[0]) as adapted:
        expected = transformers_answers(adapted, prompts, 6, None)
    assert writers.engine.generate(items, 6, stop=False) == expected


def test_generation_applies_no_dropout_and_leaves_no_gradient() -> None:
    def answers(dropout: float) -> list[list[int]]:
        engine = PackedEngine(base_of(llama()))
        adapter = engine.add(settings(dropout=dropout), 0)
        make_b_random(adapter, scale=0.3)
        found = engine.generate(items_of(adapter, PROMPTS), 5, stop=False)
        assert not adapter.gradients.any()
        return found

    assert answers(0.5) == answers(0.0)


def test_both_engines_generate_the_same(writers: Writers, end: int) -> None:
    packed = writers.write(end)[: len(PROMPTS)]
    single = PeftEngine(writers.base).generate(items_of(None, PROMPTS), TOKENS, stop=True)
    assert [answer[: len(own)] for answer, own in zip(single, packed, strict=True)] == packed


def test_more_generations_fit_in_a_batch_if_they_are_shorter(writers: Writers) -> None:
    max_prompts = writers.engine.max_prompts
    few, many = (max_prompts(writers.items, tokens) for tokens in (400, 4))
    assert 1 <= few < many
    assert max_prompts(writers.items, 10**9) == 1
