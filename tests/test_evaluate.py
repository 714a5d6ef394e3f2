"""Scores of the held-out rows equal a computation that shares no code with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllama_lab.config import Science, part
from tinyllama_lab.core.data import DataCache, Example
from tinyllama_lab.core.evaluate import (
    ExampleLoss,
    example_losses,
    loss_metrics,
    write_per_example,
)
from tinyllama_lab.core.model import Base
from tinyllama_lab.errors import DivergedError, StoppedError
from tinyllama_lab.trial import Trial


@pytest.fixture(scope="module")
def heldout(tiny_base: Base, configure: Any) -> list[Example]:
    data = part(Science, configure({"data.eval_n": 7, "data.n": 1})).data
    return DataCache(tiny_base.tokenizer).prepare(data).heldout


def never() -> bool:
    return False


@torch.no_grad()
def independent_perplexity(base: Base, examples: list[Example]) -> tuple[float, list[float]]:
    """One row at a time, all logits, log-softmax by hand in float64."""
    sums, tokens = [], 0
    for example in examples:
        logits = base.model(torch.tensor([example.ids])).logits[0].double()
        logs = logits - logits.logsumexp(dim=-1, keepdim=True)
        total = 0.0
        for place in range(1, len(example.ids)):
            if example.learned[place]:
                total -= float(logs[place - 1, example.ids[place]])
                tokens += 1
        sums.append(total)
    return math.exp(sum(sums) / tokens), sums


@pytest.mark.parametrize("max_tokens", [1, 500, 10**6])
def test_perplexity_and_sums_equal_an_independent_computation(
    max_tokens: int, tiny_base: Base, heldout: list[Example]
) -> None:
    perplexity, sums = independent_perplexity(tiny_base, heldout)
    losses = example_losses(tiny_base, heldout, max_tokens, never)
    assert [each.example for each in losses] == list(range(7))
    assert [each.loss for each in losses] == pytest.approx(sums, rel=1e-6)
    assert [each.tokens for each in losses] == [sum(e.learned) for e in heldout]
    metrics = loss_metrics(losses)
    assert metrics["eval/perplexity"] == pytest.approx(perplexity, rel=1e-6)
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(metrics["eval/loss"]))


def test_the_order_is_that_of_the_examples(tiny_base: Base, heldout: list[Example]) -> None:
    forward = example_losses(tiny_base, heldout, 500, never)
    backward = example_losses(tiny_base, heldout[::-1], 500, never)
    assert [e.loss for e in backward[::-1]] == pytest.approx([e.loss for e in forward], rel=1e-6)
    assert len({e.loss for e in forward}) == 7


def test_a_row_that_comes_twice_is_scored_twice(tiny_base: Base, heldout: list[Example]) -> None:
    losses = example_losses(tiny_base, [heldout[0], heldout[1], heldout[0]], 10**6, never)
    assert [each.example for each in losses] == [0, 1, 2]
    assert losses[0].loss == pytest.approx(losses[2].loss)


def test_scoring_leaves_the_random_state_and_no_gradient(
    tiny_base: Base, heldout: list[Example]
) -> None:
    tiny_base.model.train()
    before = torch.get_rng_state()
    first, second = (example_losses(tiny_base, heldout, 500, never) for _ in range(2))
    assert first == second and torch.equal(torch.get_rng_state(), before)
    assert not tiny_base.model.training


def test_scoring_stops_when_it_is_told_to(tiny_base: Base, heldout: list[Example]) -> None:
    calls: list[int] = []
    with pytest.raises(StoppedError):
        example_losses(tiny_base, heldout, 1, lambda: len(calls) >= 2 or bool(calls.append(1)))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_score(loss: float) -> None:
    with pytest.raises(DivergedError, match=r"held-out loss must be finite, got (nan|inf)"):
        loss_metrics([ExampleLoss(0, loss, 3), ExampleLoss(1, 1.0, 2)])


def test_a_huge_loss_has_a_finite_perplexity() -> None:
    assert loss_metrics([ExampleLoss(0, 5000.0, 2)])["eval/perplexity"] == math.exp(700)


def test_the_file_holds_every_row(tmp_path: Path) -> None:
    losses = [ExampleLoss(0, 1.5, 3), ExampleLoss(1, 2.0, 4)]
    write_per_example(Trial(tmp_path), losses)
    lines = Trial(tmp_path).per_example_file.read_text().splitlines()
    assert [ExampleLoss(**json.loads(line)) for line in lines] == losses
