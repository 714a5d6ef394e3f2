"""Losses of the held-out rows equal those of an independent computation."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.llamas import items_of, make_b_random, settings
from tests.packs import never, stop_after
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.dataset import DataCache, Example
from tinyllama_lab.core.engines.base import Engine
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation.losses import (
    ExampleLoss,
    example_losses,
    loss_metrics,
    write_losses,
)
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.errors import DivergedError, StoppedError
from tinyllama_lab.study.trial import Evaluation


@pytest.fixture(scope="module")
def heldout(tiny_base: Base, configure: Any) -> list[Example]:
    data = part(Science, configure({"data.eval_n": 7, "data.n": 1})).data
    return DataCache(tiny_base.tokenizer).prepare(data).heldout


@pytest.fixture(params=[PackedEngine, PeftEngine])
def engine(request: Any, tiny_base: Base) -> Engine[Any]:
    made: Engine[Any] = request.param(tiny_base)
    return made


@torch.no_grad()
def independent_perplexity(base: Base, examples: list[Example]) -> tuple[float, list[float]]:
    """Compute the perplexity one row at a time, from all logits, in float64."""
    sums, tokens = [], 0
    for example in examples:
        logits = base.model(torch.tensor([example.ids])).logits[0].double()
        logs = logits - logits.logsumexp(dim=-1, keepdim=True)
        total = 0.0
        for place in range(1, len(example.ids)):
            if example.loss_mask[place]:
                total -= float(logs[place - 1, example.ids[place]])
                tokens += 1
        sums.append(total)
    return math.exp(sum(sums) / tokens), sums


@pytest.mark.parametrize("max_tokens", [1, 500, 10**6])
def test_perplexity_and_sums_equal_an_independent_computation(
    max_tokens: int, tiny_base: Base, engine: Engine[Any], heldout: list[Example]
) -> None:
    perplexity, sums = independent_perplexity(tiny_base, heldout)
    losses = example_losses(engine, items_of(None, heldout), max_tokens, never)
    assert losses == pytest.approx(sums, rel=1e-6)
    found = [ExampleLoss(n, loss, heldout[n].labels, n, n + 1) for n, loss in enumerate(losses)]
    assert [each.tokens for each in found] == [sum(e.loss_mask) for e in heldout]
    metrics = loss_metrics(found)
    assert metrics["eval/perplexity"] == pytest.approx(perplexity, rel=1e-6)
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(metrics["eval/loss"]))


def test_the_loss_of_an_adapter_equals_that_of_peft_alone(
    tiny_base: Base, engine: Engine[Any], heldout: list[Example], tmp_path: Path
) -> None:
    fresh = copy.deepcopy(tiny_base.model)
    adapter = engine.add(settings(), 0)
    make_b_random(adapter)
    adapter.save(tmp_path / "adapter")
    losses = example_losses(engine, items_of(adapter, heldout), 500, never)
    engine.remove(adapter)
    adapted: Any = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    alone = dataclasses.replace(tiny_base, model=adapted)
    perplexity, sums = independent_perplexity(alone, heldout)
    found = [ExampleLoss(n, loss, heldout[n].labels, n, n + 1) for n, loss in enumerate(losses)]
    assert losses == pytest.approx(sums, rel=1e-6)
    assert loss_metrics(found)["eval/perplexity"] == pytest.approx(perplexity, rel=1e-6)
    assert perplexity != pytest.approx(independent_perplexity(tiny_base, heldout)[0], rel=1e-3)


def test_losses_are_in_the_order_of_the_examples(
    engine: Engine[Any], heldout: list[Example]
) -> None:
    forward = example_losses(engine, items_of(None, heldout), 500, never)
    backward = example_losses(engine, items_of(None, heldout[::-1]), 500, never)
    assert backward[::-1] == pytest.approx(forward, rel=1e-6)
    assert len(set(forward)) == 7


def test_a_row_that_comes_twice_is_scored_twice(
    engine: Engine[Any], heldout: list[Example]
) -> None:
    twice = [heldout[0], heldout[1], heldout[0]]
    losses = example_losses(engine, items_of(None, twice), 10**6, never)
    assert len(losses) == 3 and losses[0] == pytest.approx(losses[2])


def test_the_base_and_adapters_are_scored_side_by_side(
    engine: Engine[Any], heldout: list[Example]
) -> None:
    bare = example_losses(engine, items_of(None, heldout), 500, never)
    adapter = engine.add(settings(dropout=0.5), 0)
    make_b_random(adapter)
    both = [*items_of(None, heldout), *items_of(adapter, heldout)]
    losses = example_losses(engine, both, 500, never)
    again = example_losses(engine, items_of(adapter, heldout), 10**6, never)
    engine.remove(adapter)
    assert losses[:7] == pytest.approx(bare, rel=1e-6)
    assert losses[7:] == pytest.approx(again, rel=1e-6) != pytest.approx(bare, rel=1e-4)


def test_scoring_keeps_the_random_state_and_leaves_no_gradient(
    tiny_base: Base, engine: Engine[Any], heldout: list[Example]
) -> None:
    tiny_base.model.train()
    before, items = torch.get_rng_state(), items_of(None, heldout)
    first, second = (example_losses(engine, items, 500, never) for _ in range(2))
    tiny_base.model.eval()
    assert first == second and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in tiny_base.model.parameters())


def test_scoring_stops_on_request(engine: Engine[Any], heldout: list[Example]) -> None:
    with pytest.raises(StoppedError):
        example_losses(engine, items_of(None, heldout), 1, stop_after(2))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    with pytest.raises(DivergedError, match=r"must be finite, got (nan|inf); lower train.lr$"):
        loss_metrics([ExampleLoss(0, loss, 3, 0, 1), ExampleLoss(1, 1.0, 2, 1, 2)])
    with pytest.raises(DivergedError, match=r"of the base must be finite, .*=fp32, or take an"):
        loss_metrics([ExampleLoss(0, loss, 3, 0, 1)], is_base=True)


def test_a_huge_loss_has_a_finite_perplexity() -> None:
    assert loss_metrics([ExampleLoss(0, 5000.0, 2, 0, 1)])["eval/perplexity"] == math.exp(700)


def test_the_file_holds_every_row(tmp_path: Path) -> None:
    losses = [ExampleLoss(0, 1.5, 3, 0, 1), ExampleLoss(1, 2.0, 4, 1, 2)]
    write_losses(Evaluation(tmp_path).per_example_file, losses)
    lines = Evaluation(tmp_path).per_example_file.read_text().splitlines()
    assert [ExampleLoss(**json.loads(line)) for line in lines] == losses
