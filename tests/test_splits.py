"""Splitting rows: what every split must hold, whatever the rows."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rows import ROOT, config, many, row

from tinyllama_lab.errors import DataError
from tinyllama_lab.rows import Row, Turn, to_rows
from tinyllama_lab.sources import load_rows, travel_file
from tinyllama_lab.splits import Split, check_enough, normalise, split_rows

ALPACA = ROOT.parent / "shared" / "data" / "alpaca_1k.jsonl"

letters = st.text("abAB \u00e9\u0301", min_size=1, max_size=3).filter(str.strip)
some_rows = st.lists(
    st.builds(row, letters, letters, balance=st.sampled_from("xyz"), split=st.just("")),
    max_size=60,
)
marked_rows = st.lists(
    st.builds(row, letters, letters, split=st.sampled_from(["train", "Test", "heldout", "dev"])),
    max_size=60,
)
MARKED: dict[str, Any] = {"columns": {"split": "split"}}


def prompts(rows: list[Row]) -> set[str]:
    return {normalise(each.prompt) for each in rows}


@given(rows=some_rows | marked_rows, eval_n=st.integers(1, 30), seed=st.integers(0, 9))
def test_a_split_does_not_leak_and_does_not_depend_on_file_order(
    rows: list[Row], eval_n: int, seed: int
) -> None:
    for data in (config(eval_n=eval_n), config(eval_n=eval_n, **MARKED)):
        split = split_rows(rows, data)
        assert not prompts(split.train) & prompts(split.heldout)
        texts = [(normalise(r.prompt), normalise(r.response)) for r in split.train + split.heldout]
        assert len(set(texts)) == len(texts)
        assert len(texts) + split.dropped.total() == len(rows)
        assert split_rows(random.Random(seed).sample(rows, len(rows)), data) == split


@given(rows=some_rows, small=st.integers(1, 10), more=st.integers(0, 10), balance=st.booleans())
def test_neither_size_changes_the_other_set(
    rows: list[Row], small: int, more: int, balance: bool
) -> None:
    column = "topic" if balance else None
    first = split_rows(rows, config(eval_n=small, n=10, balance_by=column))
    second = split_rows(rows, config(eval_n=small + more, n=20, balance_by=column))
    assert second.heldout[: len(first.heldout)] == first.heldout
    left = set(second.train)
    assert second.train == [each for each in first.train if each in left]
    assert split_rows(rows, config(eval_n=small, n=999, balance_by=column)) == first


@given(rows=marked_rows, small=st.integers(1, 10), large=st.integers(11, 60))
def test_with_a_split_column_eval_n_changes_nothing(
    rows: list[Row], small: int, large: int
) -> None:
    if any(each.split in ("Test", "heldout") for each in rows):
        splits = [split_rows(rows, config(eval_n=size, **MARKED)) for size in (small, large)]
        assert splits[0] == splits[1]
        assert {each.split for each in splits[0].train} <= {"train"}
        assert {each.split for each in splits[0].heldout} <= {"Test", "heldout"}


def test_training_takes_from_the_tail_and_never_the_reserve() -> None:
    rows = many(200)
    split = split_rows(rows, config(eval_n=40))
    assert len(split.heldout) == 40 + 20
    assert len(split.train) == 200 - 60
    larger = split_rows(rows, config(eval_n=80))
    assert len(larger.heldout) == 80 + 20
    assert larger.train == split.train[: 200 - 100]  # the prefix stays, rows leave at its end


def test_the_reserve_is_small_in_a_small_set() -> None:
    split = split_rows(many(20), config(eval_n=5))
    assert (len(split.heldout), len(split.train)) == (5 + 2, 13)


def test_duplicates_are_found_after_normalising() -> None:
    decomposed = unicodedata.normalize("NFD", "Caf\u00e9")
    rows = [
        row("caf\u00e9  now", "Yes"),
        row(f"{decomposed}\nNOW ", " yes"),
        row("caf\u00e9", "Yes"),
    ]
    split = split_rows(rows, config(eval_n=1))
    assert split.dropped["duplicate"] == 1
    assert len(split.train) == 2 - len(split.heldout) == 1


def test_context_is_part_of_the_prompt() -> None:
    rows = [row("Summarise", context=f"text {number}") for number in range(50)]
    split = split_rows(rows, config(eval_n=10))
    assert (len(split.heldout), len(split.train)) == (15, 35)


def test_another_answer_to_a_heldout_prompt_leaves_training() -> None:
    rows = [row("same", f"answer {number}") for number in range(50)] + many(10)
    split = split_rows(rows, config(eval_n=30))
    assert sum(each.prompt == "same" for each in split.heldout) > 0
    assert "same" not in prompts(split.train)
    assert split.dropped["in_heldout"] == 60 - len(split.heldout) - len(split.train) > 0
    marked = [row("Same", "a", split="test"), row("same", "b", split="train")]
    split = split_rows(marked, config(**MARKED))
    assert split == Split([], marked[:1], Counter({"in_heldout": 1}))


def test_chat_rows_that_ask_the_same_share_a_prompt() -> None:
    def chat(system: str, answer: str, split: str) -> Row:
        turns = (Turn("system", system), Turn("user", "q"), Turn("assistant", answer))
        return row("q", answer, messages=turns, split=split)

    rows = [chat("s", "a", "test"), chat("S ", "b", "train"), chat("other", "c", "train")]
    split = split_rows(rows, config(**MARKED))
    assert split.train == rows[2:]


def test_a_split_column_without_heldout_rows_is_split_by_hash() -> None:
    rows = many(50, split="train")
    assert split_rows(rows, config(eval_n=10, **MARKED)) == split_rows(rows, config(eval_n=10))


def test_rows_of_other_splits_are_counted() -> None:
    rows = [row("a", split="test"), row("b", split="dev"), row("c", split=" Train")]
    split = split_rows(rows, config(**MARKED), Counter(empty_prompt=3))
    assert split.dropped == Counter({"empty_prompt": 3, "other_split": 1})
    assert split.train == rows[2:]


def test_balance_takes_the_groups_in_turn() -> None:
    groups = {"a": 40, "b": 10, "c": 20}
    rows = [row(f"{g} {i}", balance=g) for g, size in groups.items() for i in range(size)]
    train = split_rows(rows, config(eval_n=1, balance_by="topic")).train
    assert [each.balance for each in train[:9]] == ["a", "b", "c"] * 3
    plain = split_rows(rows, config(eval_n=1)).train
    for group in groups:  # inside a group the order is that of the unbalanced set
        assert [r for r in train if r.balance == group] == [r for r in plain if r.balance == group]


def test_too_few_rows_are_refused_with_a_way_out() -> None:
    split = Split(many(42), many(3), Counter(duplicate=12, in_heldout=3, too_long=5))
    check_enough(split, config(n=42, eval_n=3), "data=dolly")
    with pytest.raises(DataError) as caught:
        check_enough(split, config(n=50, eval_n=4), "data=dolly")
    assert str(caught.value).splitlines() == [
        "data.n=50 needs 50 usable training rows, but data=dolly has only 42 usable training "
        "rows (dropped: 12 duplicate, 5 too_long, 3 in_heldout); lower data.n to 42, lower "
        "data.eval_n, raise data.max_length or add rows",
        "data.eval_n=4 needs 4 usable held-out rows, but data=dolly has only 3 usable held-out "
        "rows (dropped: 12 duplicate, 5 too_long, 3 in_heldout); lower data.eval_n to 3, raise "
        "data.max_length or add rows",
    ]
    with pytest.raises(DataError, match="has only 0 .*name another set with data=..."):
        check_enough(Split([], many(9), Counter()), config(n=1, eval_n=9), "data=file")


@pytest.mark.skipif(not travel_file().is_file(), reason="the travel set is not written yet")
def test_travel_has_what_its_configuration_asks_for() -> None:
    data = config("travel")
    rows, dropped = to_rows(load_rows(data), data)
    check_enough(split_rows(rows, data, dropped), data, "data=travel")


@pytest.mark.skipif(not ALPACA.is_file(), reason=f"{ALPACA} is not on this machine")
def test_alpaca_splits_cleanly() -> None:
    columns = {"prompt": "instruction", "context": "input", "response": "output"}
    data = config(path=str(ALPACA), columns=columns, eval_n=100)
    rows, dropped = to_rows(load_rows(data), data)
    split = split_rows(rows, data, dropped)
    held = len(split.heldout)
    assert held == 100 + 98  # a tenth of the rows that are left, in reserve
    assert len(split.train) + held + split.dropped.total() == 999
    check_enough(split, data, str(ALPACA))
