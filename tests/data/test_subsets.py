"""The selection of training rows: one draw for all seeds, or one for each."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import grid
from tests.data.test_rows import config, row
from tinyllama_lab.config.schema import DataConfig, part
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.data.splits.splits import split_rows
from tinyllama_lab.data.splits.subsets import in_training_order
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study.trial import base_config, trial_key
from tinyllama_lab.sweep.plan import check_cells

some_rows = st.lists(
    st.builds(row, st.text("abcde", min_size=1), st.just("."), balance=st.sampled_from("xyz")),
    max_size=60,
    unique_by=lambda each: each.prompt,
)


@given(rows=some_rows, seed=st.integers(0, 9), balance=st.booleans())
def test_a_draw_moves_no_row_across_the_split_and_ignores_the_order_of_the_file(
    rows: list[Any], seed: int, balance: bool
) -> None:
    data = config(eval_n=5, balance_by="topic" if balance else None, subset="seed")
    split, again = (
        split_rows(some, data) for some in (rows, random.Random(seed).sample(rows, len(rows)))
    )
    drawn = in_training_order(split.train, data, seed)
    assert sorted(drawn) == sorted(split.train)
    assert not set(drawn) & set(split.heldout)
    assert in_training_order(again.train, data, seed) == drawn
    if balance:  # each value in turn, whoever is drawn
        values = [each.balance for each in drawn]
        first = values[: len(set(values))]
        assert sorted(first) == sorted(set(values))
    nested = replace(data, subset="nested")
    assert in_training_order(split.train, nested, seed) == split.train


def test_draws_of_several_seeds_share_no_more_rows_than_chance_would() -> None:
    rows = [row(f"question {n}", "yes") for n in range(1000)]
    data = config(subset="seed")
    draws = [{each.prompt for each in in_training_order(rows, data, s)[:100]} for s in range(20)]
    shared = [len(draws[a] & draws[b]) for a in range(20) for b in range(a)]
    # hypergeometric: 100 of 1,000 twice share 10 on average, with a standard deviation of 2.85
    assert 9.3 < sum(shared) / len(shared) < 10.7 and max(shared) < 25


def test_a_trial_trains_on_the_draw_of_its_seed(configure: Any, data_cache: DataCache) -> None:
    data: DataConfig = part(DataConfig, configure({"data.subset": "seed"})["data"])
    zero, one = (data_cache.prepare(data, seed) for seed in (0, 1))
    assert zero.train != one.train and zero.heldout == one.heldout
    assert zero.facts["train_fingerprint"] != one.facts["train_fingerprint"]
    assert data_cache.prepare(data, 0) is zero
    many = data_cache.prepare(replace(data, n=2 * int(data.n)), 1)
    assert many.train[: len(one.train)] == one.train
    nested = replace(data, subset="nested")
    assert data_cache.prepare(nested, 0) is data_cache.prepare(nested, 1)
    held = {example.prompt for example in zero.heldout}
    assert not held & {example.prompt for example in (*zero.train, *many.train)}


def test_nested_trials_keep_their_keys_and_a_draw_keeps_the_base() -> None:
    plain = grid.plain(*grid.SMALL)
    before = {**plain, "data": {k: v for k, v in plain["data"].items() if k != "subset"}}
    drawn = {**plain, "data": {**plain["data"], "subset": "seed"}}
    assert trial_key(plain) == trial_key(before) != trial_key(drawn)
    assert trial_key(base_config(plain)) == trial_key(base_config(drawn))


def test_a_draw_of_all_rows_is_refused() -> None:
    cell = grid.COMPOSER([*grid.SMALL, "data.n=all", "data.subset=seed"])
    with pytest.raises(ConfigError, match=r"data\.subset has no effect with data\.n=all.*n=100"):
        check_cells([cell])
