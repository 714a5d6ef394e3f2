"""Rows that are left out: their number, reasons, and first records."""

from __future__ import annotations

from collections import Counter

from tinyllama_lab.data.rows import LeftOut, LeftOutRecord


def test_left_out_rows_are_counted_with_the_first_record_of_each_reason() -> None:
    left = LeftOut()
    for reason, number in (("empty_response", 17), ("odd_cells", 9), ("empty_response", 3)):
        left.add(reason, number)
    left.add("odd_cells")  # a row whose record is not known
    left.add("odd_cells", 40)
    assert left.facts == {"empty_response": 2, "odd_cells": 3}
    assert left.first == {"empty_response": 3, "odd_cells": 9}
    assert left.sentence(60) == (
        "5 of 60 rows left out: 3 odd cells (first: row 9), 2 empty responses (first: row 3)"
    )
    assert LeftOut().sentence(60) == ""
    assert LeftOut(Counter(tool_calls=5)).reasons == "5 with tools defined or called"
    assert LeftOut(Counter(tool_calls=1)).reasons == "1 with tools defined or called"
    assert LeftOut(Counter(odd_cells=1, in_heldout=2)).reasons == (
        "2 too close to a held-out row, 1 odd cell"
    )


def test_the_first_ten_rows_of_each_reason_are_listed() -> None:
    left = LeftOut()
    for number in range(40, 26, -1):
        left.add("empty_response", number)
    left.add("duplicate", 9, same_as=4)
    left.add("too_long", 5)
    assert list(left.listed) == [
        "empty responses: rows 27, 28, 29, 30, 31, 32, 33, 34, 35, 36 and 4 more",
        "duplicates: row 9 (same as 4)",
    ]
    assert list((LeftOut() | left).listed) == list(left.listed)


def test_left_out_rows_of_two_steps_are_merged() -> None:
    one = LeftOut(Counter(duplicate=2, too_long=1), {"duplicate": [LeftOutRecord(8)]})
    two = LeftOut(Counter(duplicate=1), {"duplicate": [LeftOutRecord(5)]})
    assert one | two == LeftOut(
        Counter(duplicate=3, too_long=1), {"duplicate": [LeftOutRecord(5), LeftOutRecord(8)]}
    )
    assert (one | two).facts == (two | one).facts
    one.add("too_long", 3, "its prompt takes 90 of 80 tokens")
    assert LeftOut.of(one) == one
    assert (one | two).details == (two | one).details == one.details != {}
    one = LeftOut(Counter(duplicate=2, too_long=1), {"duplicate": [LeftOutRecord(8)]})
    assert one.counts["duplicate"] == 2  # neither is changed


def test_plain_counts_become_left_out_rows() -> None:
    assert LeftOut.of(None) == LeftOut.of({}) == LeftOut()
    assert LeftOut.of(Counter(duplicate=2, other=0)).reasons == "2 duplicates"
    one = LeftOut(Counter(duplicate=2), {"duplicate": [LeftOutRecord(8)]})
    copy = LeftOut.of(one)
    copy.add("duplicate", 1)
    assert one.first == {"duplicate": 8} and copy.first == {"duplicate": 1}
