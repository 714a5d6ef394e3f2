"""Data sets with too few rows: the message explains the numbers, and its proposals work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_rows import config, many, row
from tinyllama_lab.data.rows import LeftOut, RawRow
from tinyllama_lab.data.splits.enough import check_enough
from tinyllama_lab.data.splits.splits import Split, split_records, split_rows
from tinyllama_lab.errors import DataError


def refusal(rows: Sequence[RawRow], usable: Any = None, **settings: Any) -> list[str]:
    """Return the problems of a data set; empty if it is accepted."""
    data = config(**settings)
    try:
        check_enough(split_rows(rows, data), data, "data=file", usable)
    except DataError as error:
        return error.problems
    return []


def ways(problem: str) -> list[dict[str, Any]]:
    """Return the settings that a message says to type, one list for each proposal."""
    found = re.search(r"type ((?:data\.\w+=\w+ ?|or )+)", problem)
    return [
        {name: value if value == "all" else int(value) for name, value in settings}
        for way in (found[1].split(" or ") if found else ())
        if (settings := re.findall(r"data\.(\w+)=(\w+)", way))
    ]


def typed(problem: str) -> dict[str, Any]:
    """Return the settings of the first proposal; empty if there is none."""
    return next(iter(ways(problem)), {})


def test_80_rows_say_where_they_are() -> None:
    assert refusal(many(80), n=512, eval_n=64) == [
        "data.n=512 needs 512 usable training rows, and data=file has 8: of 80 rows 72 are held "
        "back for scoring (data.eval_n=64 and a reserve of 8 in case some are unusable), 8 are "
        "left to train on; type data.n=60 data.eval_n=12, or add rows"
    ]
    assert refusal(many(80), n=60, eval_n=12) == []


def test_every_shortage_is_a_problem_of_its_own_with_one_way_out() -> None:
    problems = refusal(many(20), n=50, eval_n=30)
    assert [problem.partition(":")[0] for problem in problems] == [
        "data.n=50 needs 50 usable training rows, and data=file has 0",
        "data.eval_n=30 needs 30 usable held-out rows, and data=file has 20",
    ]
    assert [typed(problem) for problem in problems] == [{"n": 15, "eval_n": 3}] * 2
    assert refusal(many(20), n=15, eval_n=3) == []


def test_n_stays_where_a_smaller_eval_n_makes_it_possible() -> None:
    (problem,) = refusal(many(560), n=512, eval_n=64)
    # 24, and 24 in reserve; or as many as are left of 560 with 64, and 56 in reserve
    assert ways(problem) == [{"eval_n": 24}, {"n": 440}]
    assert refusal(many(560), n=512, eval_n=24) == []
    assert refusal(many(560), n=512, eval_n=25)


def test_all_trials_of_a_sweep_are_told_one_way_that_they_can_share() -> None:
    told = [ways(problem) for n in (64, 512) for problem in refusal(many(80), n=n, eval_n=64)]
    shared = {"n": 60, "eval_n": 12}
    assert told == [[{"eval_n": 8}, shared], [shared]]
    assert all(refusal(many(80), **{**shared, "n": n}) == [] for n in (8, 60))


def test_eval_n_stays_where_enough_is_left() -> None:
    (problem,) = refusal(many(500), n=512, eval_n=64)
    assert typed(problem) == {"n": 500 - 64 - 50}


def test_all_rows_are_fewer_than_one() -> None:
    (problem,) = (p for p in refusal(many(8), n="all", eval_n=64) if "data.n" in p[:8])
    assert "data.n=all needs 1 usable training row, and data=file has 0" in problem
    assert typed(problem) == {"eval_n": 2}
    assert refusal(many(8), n="all", eval_n=2) == []


def test_rows_that_are_left_out_are_named() -> None:
    rows = [row(f"q {n}", number=n + 1) for n in range(30)] + [row("q 3", number=31)]
    (problem,) = refusal(rows, lambda each: each.number % 2 == 0, n=40, eval_n=5)
    assert (
        "of 31 rows 8 are held back for scoring (data.eval_n=5 and a reserve of 3 in case some "
        "are unusable), 22 are left to train on, 1 left out (1 duplicate (first: row 31)); 15 "
        "of these are unusable once they are tokens" in problem
    )
    assert problem.endswith(", or add rows")


def test_marked_rows_do_not_depend_on_eval_n() -> None:
    rows = many(30, split="train") + [row(f"t {n}", split="val") for n in range(9)]
    problems = refusal(rows, n=40, eval_n=20, columns={"split": "split"})
    assert [typed(problem) for problem in problems] == [{"n": 30, "eval_n": 9}]
    assert "9 are held back for scoring, 30 are left to train on" in problems[0]
    assert "eval_n" not in problems[0].partition(":")[2].partition("type")[0]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        many(1),
        [row("one", f"answer {number}") for number in range(40)],
        many(40, split="train") + [row("question 1", "other", split="val")],
    ],
    ids=["none", "one", "one prompt", "all unusable"],
)
def test_what_cannot_work_is_said(rows: list[RawRow]) -> None:
    usable = (lambda each: each.split == "train") if rows and rows[0].split else None
    problems = refusal(rows, usable, n=2, eval_n=2, columns={"split": "split"})
    assert problems and all("no values of data.n and data.eval_n work" in p for p in problems)
    assert all(typed(problem) == {} for problem in problems)


def test_rows_are_asked_about_only_as_long_as_it_matters() -> None:
    asked: list[RawRow] = []

    def usable(each: RawRow) -> bool:
        asked.append(each)
        return True

    assert refusal(many(500), usable, n=20, eval_n=10) == []
    assert len(asked) == 30


labels = st.sampled_from(["", "", "a", "b"])
any_rows = st.lists(
    st.builds(row, st.sampled_from("abcdefghijklmnopqrst"), st.sampled_from("xyz"), group=labels),
    max_size=50,
) | st.integers(0, 90).map(many)


@given(
    rows=any_rows,
    unusable=st.sets(st.integers(0, 90)),
    n=st.integers(1, 80) | st.just("all"),
    eval_n=st.integers(1, 80),
    marked=st.booleans(),
)
def test_the_numbers_of_a_refusal_work(
    rows: list[RawRow], unusable: set[int], n: int | str, eval_n: int, marked: bool
) -> None:
    if marked:
        rows = [
            row(r.prompt + str(n), r.response, split=("train", "dev")[n % 3 == 0])
            for n, r in enumerate(rows)
        ]
    bad = {id(each) for place, each in enumerate(rows) if place in unusable}

    def usable(each: RawRow) -> bool:
        return id(each) not in bad

    if marked and not any(each.split == "train" for each in rows):
        return
    problems = refusal(rows, usable, n=n, eval_n=eval_n)
    if not problems:
        return
    suggested = ways(problems[0])
    assert all(ways(problem) == suggested for problem in problems)
    for way in suggested:
        settings = {"n": n, "eval_n": eval_n} | way
        assert refusal(rows, usable, **settings) == []
        assert n == "all" or settings["n"] <= n
    if not suggested:
        assert all(refusal(rows, usable, n=1, eval_n=size) for size in range(1, len(rows) + 1))


def test_a_refusal_names_the_column_that_holds_no_text() -> None:
    records = [{"prompt": f"q {n}", "response": "r", "who": ["a"]} for n in range(20)]
    data = config(columns={"prompt": "prompt", "response": "response", "group": "who"})
    split = split_records(records, data)
    with pytest.raises(DataError) as caught:
        check_enough(split, data, "data=file")
    assert (
        "20 of 20 rows left out (20 lists or bytes instead of text (first: row 1): a cell must be "
        "text, got a list (column 'who'))"
    ) in str(caught.value)
    assert len(caught.value.problems) == 1 and "add rows" not in str(caught.value)


def test_a_split_without_candidates_of_its_own_is_counted_as_it_is() -> None:
    split = Split(many(5), many(2), LeftOut())
    check_enough(split, config(n=5, eval_n=2), "data=hub")
    with pytest.raises(DataError, match="type data.n=5 data.eval_n=2, or add rows"):
        check_enough(split, config(n=6, eval_n=3), "data=hub")


@pytest.mark.parametrize(
    ("record", "settings", "reason", "remedy"),
    [
        (
            {"log": [{"id": 1, "words": "q"}, {"id": 2, "words": "r"}]},
            {"columns": {"messages": "log"}},
            "20 unknown roles (first: row 1): the role of a message must be system, user,",
            "write the role of every message as user or assistant",
        ),
        (
            {"prompt": "q", "response": ""},
            {"columns": {"prompt": "prompt", "response": "response"}},
            "20 empty responses (first: row 1)",
            "name the column of answers in data.columns.response",
        ),
        (
            {"prompt": "q", "response": "error"},
            {"drop_containing": ["error"]},
            "20 failed calls (first: row 1)",
            "take the text that all responses hold out of data.drop_containing",
        ),
    ],
)
def test_where_no_row_is_left_the_reason_is_said_once(
    record: dict[str, Any], settings: dict[str, Any], reason: str, remedy: str
) -> None:
    data = config(n=8, eval_n=4, **settings)
    with pytest.raises(DataError) as caught:
        check_enough(split_records([record] * 20, data), data, "data=file")
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"data=file has no usable row: 20 of 20 rows left out ({reason}"
    ) and problem.endswith(f"; {remedy}, or name another set with data=...")


def test_what_no_numbers_can_mend_is_said_once() -> None:
    (problem,) = refusal([row("one", f"answer {n}") for n in range(40)], n=60, eval_n=50)
    assert problem.startswith("data.n=60 needs 60 usable training rows, and data=file has 0, and ")
    assert problem.count("no values of data.n and data.eval_n work") == 1
