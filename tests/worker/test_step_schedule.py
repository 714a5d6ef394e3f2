"""The rows and the learning rate of every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from tinyllama_lab.config.schema import TrainConfig
from tinyllama_lab.core.training.step_schedule import batches, lr_factor, steps_of


def settings(**changes: Any) -> TrainConfig:
    plain: dict[str, Any] = dict(
        epochs=1.0, max_steps=None, batch_size=4, lr=1e-3, schedule="cosine", warmup_ratio=0.1
    )
    plain |= dict(weight_decay=0.0, clip_norm=1.0, max_loss=20.0, precision="fp32")
    plain |= dict(
        deterministic=False,
        optimizer="adamw",
        loraplus_ratio=None,
        label_smoothing=0.0,
        neftune_alpha=0.0,
        eval_every=None,
        keep="last",
        patience=None,
    )
    return TrainConfig(**{**plain, **changes})


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_every_epoch_is_a_permutation(rows: int, epochs: int, size: int, seed: int) -> None:
    train = settings(epochs=float(epochs), batch_size=size)
    found = list(batches(rows, train, seed))
    flat = [row for batch in found for row in batch]
    assert len(flat) == rows * epochs
    for start in range(0, len(flat), rows):
        assert sorted(flat[start : start + rows]) == list(range(rows))
    assert all(len(batch) == size for batch in found[:-1])
    assert found == list(batches(rows, train, seed))


@given(st.integers(1, 200), st.floats(0.01, 5), st.integers(1, 33))
def test_as_many_batches_as_steps(rows: int, epochs: float, size: int) -> None:
    train = settings(epochs=epochs, batch_size=size)
    found = list(batches(rows, train, 0))
    assert len(found) == steps_of(rows, train)
    assert abs(sum(map(len, found)) - rows * epochs) <= 1


def test_the_seed_decides_the_order() -> None:
    orders = [list(batches(50, settings(), seed)) for seed in range(4)]
    assert len({str(order) for order in orders}) == 4
    first, second = (sum(list(batches(50, settings(epochs=e), 0)), []) for e in (1.0, 2.0))
    assert second[:50] == first and second[50:] != first


@pytest.mark.parametrize(("epochs", "sizes"), [(0.5, [4, 1]), (1.0, [4, 4, 2]), (1.2, [4, 4, 4])])
def test_the_last_batch_may_be_short(epochs: float, sizes: list[int]) -> None:
    assert [len(batch) for batch in batches(10, settings(epochs=epochs), 0)] == sizes


@pytest.mark.parametrize("steps", [1, 7])
def test_max_steps_counts_full_batches_whatever_the_epochs(steps: int) -> None:
    train = settings(max_steps=steps, epochs=0.1)
    assert [len(batch) for batch in batches(6, train, 0)] == [4] * steps
    assert steps_of(6, train) == steps


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5])
def test_decay_equals_transformers(schedule: str, ratio: float) -> None:
    steps, train = 20, settings(schedule=schedule, warmup_ratio=ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = round(steps * ratio)
    scheduler = get_scheduler(schedule, optimizer, warmup, steps)
    expected = []
    for _ in range(steps):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    found = [lr_factor(step, steps, train) for step in range(steps)]
    assert found[warmup:] == pytest.approx(expected[warmup:], abs=1e-12)
    # transformers warms up from 0 and wastes a step; here the first step already moves
    assert found[:warmup] == pytest.approx([(i + 1) / (warmup + 1) for i in range(warmup)])


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from(["cosine", "linear", "constant"]))
def test_the_factor_stays_above_zero_and_at_most_one(
    steps: int, ratio: float, schedule: str
) -> None:
    train = settings(warmup_ratio=ratio, schedule=schedule)
    assert all(0 < lr_factor(step, steps, train) <= 1 for step in range(steps))
