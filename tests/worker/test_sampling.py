"""Sampled generations: each prompt has its own random stream, independent of its batch."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch

from tests.llamas import base_of, example, items_of, llama, make_b_random, settings
from tests.packs import Lab, result
from tests.studies import first_evaluation
from tinyllama_lab.core.engines.base import Engine
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.engines.sampling import Chooser, TokenSampling
from tinyllama_lab.study.trial import TrialFolder

TOKENS = 9
PROMPTS = [example(length, prompt=length) for length in (9, 1, 40, 10, 3, 9)]
WARM = TokenSampling(1.0, 0)


@pytest.fixture(params=[PackedEngine, PeftEngine])
def engine(request: Any) -> Engine[Any]:
    made: Engine[Any] = request.param(base_of(llama()))
    return made


def write(engine: Engine[Any], sampling: TokenSampling | None, chosen: Any = PROMPTS) -> list[Any]:
    found = engine.generate(items_of(None, chosen), TOKENS, True, sampling)
    return [answer[: answer.index(1) + 1] if 1 in answer else answer for answer in found]


def test_samples_do_not_depend_on_the_others_of_their_batch(engine: Engine[Any]) -> None:
    together = write(engine, WARM)
    assert together != write(engine, None)
    assert write(engine, WARM, PROMPTS[::-1]) == together[::-1]
    assert [write(engine, WARM, [prompt])[0] for prompt in PROMPTS] == together
    torch.manual_seed(5)
    assert write(engine, WARM) == together


def test_both_engines_sample_the_same_tokens() -> None:
    base = base_of(llama())
    assert write(PackedEngine(base), WARM) == write(PeftEngine(base), WARM)


def test_an_adapter_samples_in_a_pack_as_it_does_alone() -> None:
    engine = PackedEngine(base_of(llama()))
    adapters = [engine.add(settings(), seed) for seed in (0, 1)]
    for seed, adapter in enumerate(adapters):
        make_b_random(adapter, seed, scale=0.3)
    work = [item for adapter in adapters for item in items_of(adapter, PROMPTS)]
    together = engine.generate(work, TOKENS, True, WARM)
    alone = [engine.generate(items_of(a, PROMPTS), TOKENS, True, WARM) for a in adapters]
    assert together == alone[0] + alone[1] and alone[0] != alone[1]


def test_the_seed_decides_the_samples(engine: Engine[Any]) -> None:
    found = [write(engine, TokenSampling(1.0, seed)) for seed in (0, 1, 0)]
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("temperature", [1e-4, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature: float, engine: Engine[Any]) -> None:
    assert write(engine, TokenSampling(temperature, 3)) == write(engine, None)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_sampled_as_often_as_their_probability(temperature: float) -> None:
    scores = torch.tensor([2.0, -torch.inf, 0.0, 1.0, 1.0])
    prompts = [example(2, seed, prompt=2, words=10**9) for seed in range(4000)]
    choose = Chooser(TokenSampling(temperature, 0), prompts, 1)
    drawn = Counter(choose(scores.expand(4000, 5), range(4000), 0).tolist())
    expected = (scores.double() / temperature).softmax(dim=0)
    assert [drawn[token] / 4000 for token in range(5)] == pytest.approx(
        expected.tolist(), abs=0.03
    )
    assert drawn[1] == 0


def rows(trial: TrialFolder) -> list[dict[str, Any]]:
    file = first_evaluation(trial).generations_file
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_sampled_generations_are_written_beside_the_greedy_ones(lab: Lab) -> None:
    warm = {"eval.temperature": 1.0, "eval.sample_seed": 3, "eval.latency_tokens": 0}
    trials = [lab.trial({**warm, "seed": seed}) for seed in (0, 1)]
    cold = lab.trial({"eval.latency_tokens": 0})
    lab.run([*trials, cold])
    alone = lab.trial({**warm, "seed": 1}, place="alone")
    lab.run([alone])
    assert rows(alone) == rows(trials[1])
    assert all("sampled" not in row for row in rows(cold))
    greedy = [{**row, "sampled": None} for row in rows(cold)]
    assert [{**row, "sampled": None} for row in rows(trials[0])] == greedy
    assert any(row["sampled"] != row["output"] for row in rows(trials[0]))
    assert all(isinstance(row["sampled"], str) for row in rows(lab.base_trial(trials[0])))
    ours, theirs = result(trials[0]).metrics, result(cold).metrics
    assert ours["eval/bleu"] == theirs["eval/bleu"]
