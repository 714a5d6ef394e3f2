"""Splitting rows: properties that every split must have, for any rows."""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.data.test_rows import ROOT, config, many, row
from tinyllama_lab.data.formats.cells import SPLIT_KEY, split_word
from tinyllama_lab.data.rows import LeftOut, RawRow, to_rows
from tinyllama_lab.data.sources import load_rows
from tinyllama_lab.data.splits.enough import check_enough
from tinyllama_lab.data.splits.splits import normalise, split_records, split_rows
from tinyllama_lab.errors import DataError

ALPACA = ROOT.parent / "shared" / "data" / "alpaca_1k.jsonl"

letters = st.text("abAB \u00e9\u0301", min_size=1, max_size=3).filter(str.strip)
some_rows = st.lists(
    st.builds(row, letters, letters, balance=st.sampled_from("xyz"), split=st.just("")),
    max_size=60,
)
marked_rows = st.lists(
    st.builds(row, letters, letters, split=st.sampled_from(["train", "Eval", "heldout", "dev"])),
    max_size=60,
)
MARKED: dict[str, Any] = {"columns": {"split": "split"}}


def prompts(rows: list[RawRow]) -> set[str]:
    return {normalise(each.prompt) for each in rows}


def sides(row: RawRow) -> str:
    """Return the part that the name of a row of `marked_rows` stands for."""
    return "train" if row.split == "train" else "heldout"


@given(rows=some_rows | marked_rows, eval_n=st.integers(1, 30), seed=st.integers(0, 9))
def test_a_split_does_not_leak_and_does_not_depend_on_file_order(
    rows: list[RawRow], eval_n: int, seed: int
) -> None:
    assume(not any(each.split for each in rows) or any(sides(each) == "train" for each in rows))
    data = config(eval_n=eval_n)
    split = split_rows(rows, data)
    assert not prompts(split.train) & prompts(split.heldout)
    texts = [(normalise(r.prompt), normalise(r.response)) for r in split.train + split.heldout]
    assert len(set(texts)) == len(texts)
    assert split.rows == len(rows)
    assert split_rows(random.Random(seed).sample(rows, len(rows)), data) == split


def place(row: RawRow) -> tuple[str, str]:
    """Return the sort key of a row of one turn, computed as before groups existed."""
    parts = [normalise(row.context), "user", normalise(row.prompt)]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return digest, normalise(row.response)


distinct = st.lists(
    st.builds(row, st.text("abcde", min_size=1), st.just("."), balance=st.sampled_from("xyz")),
    max_size=60,
    unique_by=lambda each: each.prompt,
)


@given(rows=distinct, eval_n=st.integers(1, 30))
def test_rows_that_share_nothing_are_where_they_always_were(
    rows: list[RawRow], eval_n: int
) -> None:
    ordered = sorted(rows, key=place)
    cut = eval_n + min(max(8, eval_n), len(rows) // 10)
    split = split_rows(rows, config(eval_n=eval_n))
    assert split.heldout == ordered[:cut]
    assert split.train == ordered[cut:][::-1]


@given(rows=distinct, small=st.integers(1, 10), more=st.integers(0, 10), balance=st.booleans())
def test_neither_size_changes_the_other_set(
    rows: list[RawRow], small: int, more: int, balance: bool
) -> None:
    column = "topic" if balance else None
    first = split_rows(rows, config(eval_n=small, n=10, balance_by=column))
    second = split_rows(rows, config(eval_n=small + more, n=20, balance_by=column))
    assert second.heldout[: len(first.heldout)] == first.heldout
    left = set(second.train)
    assert second.train == [each for each in first.train if each in left]
    for n in (999, "all"):
        assert split_rows(rows, config(eval_n=small, n=n, balance_by=column)) == first


@given(rows=marked_rows, small=st.integers(1, 10), large=st.integers(11, 60))
def test_with_a_split_column_eval_n_changes_nothing(
    rows: list[RawRow], small: int, large: int
) -> None:
    if {"train", "heldout"} <= {sides(each) for each in rows}:
        splits = [split_rows(rows, config(eval_n=size, **MARKED)) for size in (small, large)]
        assert splits[0] == splits[1]
        assert {sides(each) for each in splits[0].train} <= {"train"}
        assert {sides(each) for each in splits[0].heldout} <= {"heldout"}


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
    assert split.dropped.facts == {"duplicate": 1}
    assert len(split.train) == 2 - len(split.heldout) == 1


def test_the_first_of_several_spellings_stays() -> None:
    spelled = ["hotel?", "HOTEL?", " Hotel?", "hotel?"]
    rows = [row(text, number=n) for n, text in enumerate(spelled, 2)]
    for order in (rows, rows[::-1]):
        split = split_rows([*order, row("HOTEL?", number=1), *many(40)], config(eval_n=10))
        assert [each.prompt for each in split.train + split.heldout if each.number] == ["HOTEL?"]
        assert split.dropped.facts == {"duplicate": 4} and split.dropped.first == {"duplicate": 2}


def test_a_duplicate_leaves_its_group_to_the_first() -> None:
    groups = [("same", "a"), ("Same", "b"), ("one", "a"), ("two", "b")]
    for first in range(40):  # wherever chance puts them
        rows = [row(f"{text} {first}", "r", group=group) for text, group in groups]
        split = split_rows([*rows, *many(40)], config(eval_n=20))
        assert sum(bool(each.group) for each in split.heldout) in (0, 3)


def test_what_cannot_be_seen_makes_no_other_prompt() -> None:
    rows = many(40) + [
        row("Ho\u00adtel\u200b?\ufeff", "a"),
        row("hotel?", "a"),
        row("hotel?", "b"),
    ]
    split = split_rows(rows, config(eval_n=10))
    assert split.dropped.facts == {"duplicate": 1}
    sides = ["tel" in "".join(prompts(part)) for part in (split.train, split.heldout)]
    assert sum(sides) == 1


def test_context_is_part_of_the_prompt() -> None:
    rows = [row("Summarise", context=f"text {number}") for number in range(50)]
    split = split_rows(rows, config(eval_n=10))
    assert (len(split.heldout), len(split.train)) == (15, 35)


def test_another_answer_to_a_heldout_prompt_leaves_training() -> None:
    rows = [row("same", f"answer {number}") for number in range(12)] + many(60)
    for seed in range(20):  # of the names of the others: "same" comes early, late or between
        others = [row(f"{seed} {each.prompt}") for each in rows[12:]]
        split = split_rows(rows[:12] + others, config(eval_n=30))
        for part in (split.train, split.heldout):
            assert [each.prompt for each in part].count("same") in (0, 12)
        assert split.dropped == LeftOut()
    marked = [row("Same", "a", split="dev"), row("same", "b", split="train", number=2)]
    split = split_rows(marked, config(**MARKED))
    assert (split.train, split.heldout) == ([], marked[:1])
    assert (split.dropped.facts, split.dropped.first) == ({"in_heldout": 1}, {"in_heldout": 2})


def test_balance_takes_the_groups_in_turn() -> None:
    groups = {"a": 40, "b": 10, "c": 20}
    rows = [row(f"{g} {i}", balance=g) for g, size in groups.items() for i in range(size)]
    train = split_rows(rows, config(eval_n=1, balance_by="topic")).train
    assert [each.balance for each in train[:9]] == ["a", "b", "c"] * 3
    plain = split_rows(rows, config(eval_n=1)).train
    for group in groups:  # inside a group the order is that of the unbalanced set
        assert [r for r in train if r.balance == group] == [r for r in plain if r.balance == group]


# ---- names of splits -------------------------------------------------------------------------

NAMES: dict[str | None, str] = {
    "train": "train training Train TRAINING train-00000-of-00001 my_train_2 trainset TrainData",
    "heldout": "test testing eval evaluation val valid validation dev development holdout "
    "hold-out held_out HeldOut heldout test-00000-of-00001 my_valid_2 dev.jsonl "
    "validation-matched VAL1 testset data/test tests validate evals TestData.jsonl",
    None: "latest trained developer value contest devise unsupervised 0 1 a untrain "
    "train-test train_dev other do_not_train non-train exclude_from_train no-test",
}


@pytest.mark.parametrize(
    ("name", "side"), [(name, side) for side, names in NAMES.items() for name in names.split()]
)
def test_names_of_splits(name: str, side: str | None) -> None:
    assert split_word(name) == side


def test_every_name_that_datasets_knows_is_known() -> None:
    keywords = pytest.importorskip("datasets.data_files").SPLIT_KEYWORDS
    for split, words in keywords.items():
        for word in words:
            side = "train" if str(split) == "train" else "heldout"
            assert {
                split_word(f"{before}{word}{after}")
                for before in ("", "my_", "x-1-")
                for after in ("", "-00000-of-00002", " 2", ".jsonl.gz")
            } == {side}


def test_names_that_say_nothing_are_refused_with_their_rows() -> None:
    rows = [
        row(f"q {n}", split=name, number=n)
        for n, name in enumerate(["train", "unsupervised", "x\x1b", "test", "unsupervised"], 1)
    ]
    message = (
        r"data\.columns\.split=split must hold names of splits such as train, validation and "
        r"test, got 'unsupervised' \(2 rows, first: row 2\), 'x\\x1b' \(row 3\); "
        r"rename these, or set data\.columns\.split=''"
    )
    with pytest.raises(DataError, match=message):
        split_rows(rows, config(**MARKED))
    with pytest.raises(DataError, match="and 2 more; rename"):
        split_rows([row("q", split=f"part {letter}") for letter in "abcdefg"], config(**MARKED))


def test_a_column_called_split_is_not_passed_over_for_one_odd_name() -> None:
    """Ignoring the column would train on its held-out rows."""
    names = ["train", "unsupervised", "val"]
    records = [{"prompt": f"q {n}", "response": "r", "split": names[n % 3]} for n in range(30)]
    with pytest.raises(DataError, match=r"got 'unsupervised' \(10 rows, first: row 2\); rename"):
        split_records(records, config())
    assert split_records(records, config(columns={"split": ""})).rows == 30


@pytest.mark.parametrize("name", ["set", "Subset", "partition", "fold", "phase", "Usage"])
def test_columns_whose_cells_are_mostly_splits_are_split_columns(name: str) -> None:
    """The held-out rows may come late in the file."""
    records = [{"prompt": f"q {n}", "response": "r", name: "Train"} for n in range(300)]
    records[-20:] = [{**each, name: "PublicVal"} for each in records[-20:]]
    split = split_records(records, config(eval_n=20))
    assert {each.number for each in split.heldout} == set(range(281, 301))
    assert f"'{name}'" in split.notes[0]
    records[0][name] = "tset"  # a mistake: else the rows marked `val` would be trained on
    with pytest.raises(DataError, match=rf"columns\.split={name} .*got 'tset' \(row 1\)"):
        split_records(records, config(eval_n=20))
    for record in records[:160]:  # then it is about something else
        record[name] = "lamps"
    split = split_records(records, config(eval_n=20))
    assert len(split.heldout) == 20 + 20 and f"not used: {name}" in split.notes[0]


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ((0, 1), r"got '0' \(15 rows, first: row 1\), '1'"),
        ((True, False), "got 'true' .*, 'false'"),
        (("tr", "te"), "got 'tr' .*, 'te'"),
        (("north", "south"), "got 'north' .*, 'south'"),
    ],
)
def test_a_column_called_split_with_other_values_is_refused(values: Any, got: str) -> None:
    records = [{"prompt": f"q {n}", "response": "r", "Split": values[n % 2]} for n in range(30)]
    with pytest.raises(DataError, match=f"{got}.*; rename these, or set data.columns.split=''"):
        split_records(records, config())
    assert split_records(records, config(columns={"split": ""})).rows == 30
    empty = [{**record, "Split": " "} for record in records]
    assert split_records(empty, config()).rows == 30


def test_what_ignoring_the_splits_means_for_marked_rows_is_said() -> None:
    rows = [row(f"q {n}", split=("train", "tset", "test", "val")[n % 4]) for n in range(8)]
    with pytest.raises(DataError, match="trains on the rows marked test and val as well$"):
        split_rows(rows, config(**MARKED))
    with pytest.raises(DataError, match="to divide all rows by their content$"):
        split_rows([row("q 1", split="a"), row("q 2", split="train")], config(**MARKED))


@pytest.mark.parametrize("name", ["is_test", "isTrain", "is_validation", "in_train", "test"])
def test_a_split_in_true_and_false_is_refused(name: str) -> None:
    records = [{"prompt": f"q {n}", "response": "r", name: n > 20} for n in range(30)]
    with pytest.raises(
        DataError, match=f"got a set whose '{name}' may hold this as true and false"
    ):
        split_records(records, config())
    assert split_records(records, config(columns={"split": ""})).rows == 30
    assert split_records(records, config(eval_path="val.jsonl"), records[:3]).rows == 33
    typed = {"prompt": "prompt", "response": "response"}
    with pytest.raises(
        DataError, match=f"got a set whose '{name}' may hold this as true and false"
    ):
        split_records(records, config(columns=typed))
    assert split_records(records, config(columns={**typed, "split": ""})).rows == 30
    other = [{**record, name: "0.5"} for record in records]
    assert split_records(other, config()).rows == 30


def test_a_split_column_without_heldout_rows_is_split_by_hash_and_says_so() -> None:
    rows = many(50, split="train")
    split = split_rows(rows, config(eval_n=10, **MARKED))
    assert (len(split.heldout), len(split.train)) == (15, 35)
    assert split.notes == (
        "data.columns.split=split marks no row as held out: held-out rows are taken from the "
        "others",
    )


def test_a_split_column_without_training_rows_is_refused() -> None:
    rows = many(3, split="test") + many(2, split="dev")
    message = (
        "must mark rows to train on, such as train, got 3 test, 2 dev; add rows to train on, or "
        "set data.columns.split='' to divide all rows by their content, which trains on the rows "
        "marked test and dev as well"
    )
    with pytest.raises(DataError, match=message):
        split_rows(rows, config(**MARKED))


def test_rows_without_a_split_are_left_out_and_counted() -> None:
    rows = [
        row("a", split="val", number=1),
        row("b", split=" ", number=2),
        row("c", split=" Train", number=3),
        row("d", split="", number=4),
    ]
    split = split_rows(rows, config(**MARKED), {"empty_prompt": 3})
    assert split.dropped.facts == {"empty_prompt": 3, "no_split": 2}
    assert split.dropped.first == {"no_split": 2}
    assert (split.train, split.heldout) == (rows[2:3], rows[:1])
    nothing = many(30, split=" ")
    assert split_rows(nothing, config(eval_n=5, **MARKED)).dropped == LeftOut()


# ---- held-out rows of their own --------------------------------------------------------------


def test_held_out_records_of_their_own() -> None:
    def records(*names: str) -> list[dict[str, str]]:
        return [{"prompt": name, "response": f"to {name}"} for name in names]

    train = records("a", "b", "B ", "c", "d", "")
    held_out = records("c", "e", "e", "")
    split = split_records(train, config(eval_path="val.jsonl", eval_n=1), held_out)
    assert {each.prompt for each in split.heldout} == {"c", "e"}
    assert {normalise(each.prompt) for each in split.train} == {"a", "b", "d"}
    assert split.dropped.facts == {"duplicate": 2, "empty_prompt": 2, "in_heldout": 1}
    assert split.rows == 10
    with pytest.raises(
        DataError, match=r"^data.eval_path=val.jsonl must have .*got question; write it"
    ):
        split_records(train, config(eval_path="val.jsonl"), [{"question": "q"}])
    empty = split_records(train, config(eval_path="val.jsonl"), records(""))
    assert not empty.heldout and len(empty.train) == 4


@pytest.mark.parametrize(
    ("eval_n", "said"),
    [
        (1, "data: 1 of 3 held-out rows are scored; to score all, set data.eval_n=3"),
        (3, ""),
        (5, "data: all 3 held-out rows are scored, fewer than data.eval_n=5"),
    ],
)
def test_other_numbers_of_marked_rows_than_asked_for_are_told(eval_n: int, said: str) -> None:
    records = [{"prompt": f"q {n}", "response": "r", "split": "train"} for n in range(20)]
    records += [{"prompt": f"t {n}", "response": "r", "split": "val"} for n in range(3)]
    split = split_records(records, config(columns={"split": "split"}, eval_n=eval_n, n=20))
    assert (said in split.notes) == bool(said) and len(split.heldout) == 3
    assert not any("are scored" in note for note in split.notes) or said
    check_enough(split, config(eval_n=eval_n, n=20), "data=file")


def test_all_rows_beside_held_out_ones_are_training_rows() -> None:
    """The name of the training file does not matter."""
    train = [{"prompt": name, "response": "r", SPLIT_KEY: "heldout"} for name in "ab"]
    held_out = [{"prompt": "c", "response": "r", SPLIT_KEY: "train"}]
    split = split_records(train, config(eval_path="val.jsonl"), held_out)
    assert (len(split.train), len(split.heldout)) == (2, 1)


# ---- real sets -------------------------------------------------------------------------------


def test_travel_has_what_its_configuration_asks_for() -> None:
    data = config("travel")
    rows, dropped = to_rows(load_rows(data), data)
    split = split_rows(rows, data, dropped)
    check_enough(split, data, "data=travel")
    assert (len(split.train) >= data.n, len(split.heldout) >= data.eval_n) == (True, True)


@pytest.mark.parametrize("column", ["split", ""])
def test_the_rows_of_travel_are_where_they_always_were(column: str) -> None:
    data = config("travel", columns={"split": column})
    rows, _ = to_rows(load_rows(data), data)
    ordered = sorted(rows, key=place)
    marked = [each for each in ordered if each.split == "heldout"]
    cut = data.eval_n * 2
    split = split_rows(rows, data)
    assert split.heldout == (marked if column else ordered[:cut])
    trained = [each for each in ordered if each.split == "train"] if column else ordered[cut:]
    assert split.train == trained[::-1] and split.dropped == LeftOut()


@pytest.mark.skipif(not ALPACA.is_file(), reason=f"{ALPACA} is not on this machine")
def test_alpaca_splits_cleanly() -> None:
    columns = {"prompt": "instruction", "context": "input", "response": "output"}
    data = config(path=str(ALPACA), columns=columns, eval_n=100)
    rows, dropped = to_rows(load_rows(data), data)
    split = split_rows(rows, data, dropped)
    held = len(split.heldout)
    assert held == 100 + 98  # a tenth of the rows that are left, in reserve
    assert len(split.train) + held + split.dropped.counts.total() == 999
    check_enough(split, data, str(ALPACA))
