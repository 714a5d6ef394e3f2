"""The data facts in a result: no row is in both parts, and the lengths of the rows."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_rows import config
from tinyllama_lab.config.schema import DataConfig, part
from tinyllama_lab.core.dataset.dataset import DataCache, length_histogram
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.data.rows import RawRow, Turn
from tinyllama_lab.data.splits.overlap import count_overlap

ROW = RawRow("Where to?", "A map.", "To Pokhara.", "route", "", (), "")
TURNS = (
    Turn("user", "one"),
    Turn("assistant", "two"),
    Turn("user", "three"),
    Turn("assistant", "four"),
)
CHAT = dataclasses.replace(ROW, prompt="three", response="four", messages=TURNS)


def supervising(**changes: Any) -> DataConfig:
    """Return settings in which only those of supervision matter."""
    return dataclasses.replace(config(), **changes)


ALL, LAST = supervising(), supervising(learn="last")


@pytest.fixture
def settings(configure: Any) -> Any:
    def make(data: str = "travel", **changes: Any) -> DataConfig:
        config = configure({f"data.{k}": v for k, v in changes.items()}, data)
        built: DataConfig = part(DataConfig, config["data"])
        return built

    return make


def test_no_training_row_is_held_out_too(
    tmp_path: Path, settings: Any, data_cache: DataCache
) -> None:
    asked = [f"Question  {n % 15}" if n < 15 else f"QUESTION {n % 15} " for n in range(60)]
    rows = [{"prompt": text, "response": f"Yes {n % 30}"} for n, text in enumerate(asked)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = settings("file", path=str(path), n=6)
    assert data_cache.prepare(data).facts["overlap_rows"] == 0
    assert data_cache.prepare(settings()).facts["overlap_rows"] == 0


def test_overlap_is_counted_whatever_the_spelling() -> None:
    other = [
        dataclasses.replace(ROW, prompt=" where\nTO? ", response="to pokhara."),
        dataclasses.replace(ROW, intent="other"),
        dataclasses.replace(ROW, context="Another map."),
        dataclasses.replace(ROW, response="To Pokhara!"),
        dataclasses.replace(CHAT, messages=(Turn("user", "zero"), *TURNS[1:])),
        dataclasses.replace(CHAT, messages=(Turn("user", "zero"), Turn("assistant", "no"))),
    ]
    rows = [*other, ROW, CHAT]
    found = [count_overlap([row], [ROW, CHAT], rows, ALL) for row in other]
    assert found == [1, 1, 0, 0, 1, 0]  # an answer counts with the question right before it
    assert count_overlap(other, [ROW, CHAT], rows, ALL) == 3
    assert count_overlap([], [ROW], rows, ALL) == count_overlap(other, [], rows, ALL) == 0


def test_overlap_is_found_inside_longer_and_shorter_chats() -> None:
    longer = dataclasses.replace(
        CHAT, messages=(*TURNS, Turn("user", "5"), Turn("assistant", "6"))
    )
    shorter = dataclasses.replace(CHAT, messages=TURNS[:2])
    window = dataclasses.replace(CHAT, messages=TURNS[2:])
    rows = [longer, shorter, window]
    assert [count_overlap([r], [CHAT], [*rows, CHAT], ALL) for r in rows] == [1, 1, 1]
    assert [count_overlap([r], [CHAT], [*rows, CHAT], LAST) for r in rows] == [0, 0, 1]
    turns = tuple(dataclasses.replace(turn, supervised=False) for turn in TURNS)
    silent = dataclasses.replace(CHAT, messages=turns)
    assert count_overlap([silent], [CHAT], [silent, CHAT], ALL) == 0
    assert count_overlap([CHAT], [silent], [silent, CHAT], ALL) == 0
    everything = dataclasses.replace(ALL, mask="all")  # weights do not count then
    assert count_overlap([silent], [CHAT], [silent, CHAT], everything) == 1


def test_small_talk_is_no_overlap() -> None:
    thanks = (Turn("user", "Thanks"), Turn("assistant", "Bye"))
    rows = [
        dataclasses.replace(
            CHAT, messages=(Turn("user", f"q {n}"), Turn("assistant", f"a {n}"), *thanks)
        )
        for n in range(40)
    ]
    assert count_overlap(rows[:20], rows[20:], rows, ALL) == 0
    assert count_overlap(rows[:2], rows[2:4], rows[:4], ALL) == 2


def test_growing_prefixes_leave_no_answer_on_both_sides(
    tmp_path: Path, settings: Any, tiny_base: Base, data_cache: DataCache
) -> None:
    """Nine chats, logged after each of their answers; the test compares the tokens."""
    lines = []
    for chat in range(9):
        turns = [
            {"role": r, "content": f"{r[0]} {chat}.{n}"}
            for n in range(4)
            for r in ("user", "assistant")
        ]
        lines += [json.dumps({"messages": turns[: 2 * n + 2]}) for n in range(4)]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines))
    columns = {"prompt": None, "response": None, "messages": "messages"}
    data = settings("file", path=str(path), n="all", eval_n=9)
    data = dataclasses.replace(data, columns=dataclasses.replace(data.columns, **columns))
    prepared = data_cache.prepare(data)
    words = [
        set(re.findall(r"a \d\.\d", tiny_base.tokenizer.decode([t for e in part for t in e.ids])))
        for part in (prepared.train, prepared.heldout)
    ]
    assert len(words[1]) >= 8 and not words[0] & words[1]
    assert prepared.facts["overlap_rows"] == 0 and prepared.facts["dropped"] == {}
    assert prepared.facts["train_rows"] == 36 - 12


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5], {"edges": [5, 6], "counts": [1]}),
        ([3, 5, 5], {"edges": [3, 4, 5, 6], "counts": [1, 0, 2]}),
        (range(10, 22), {"edges": list(range(10, 23)), "counts": [1] * 12}),
        (range(10, 23), {"edges": list(range(10, 25, 2)), "counts": [2] * 6 + [1]}),
    ],
)
def test_lengths_are_counted_between_edges(lengths: Any, expected: dict[str, Any]) -> None:
    assert length_histogram(list(lengths)) == expected


@given(st.lists(st.integers(1, 5000), min_size=1))
def test_every_length_is_in_one_of_twelve_bins(lengths: list[int]) -> None:
    found = length_histogram(lengths)
    edges, counts = found["edges"], found["counts"]
    assert len(edges) == len(counts) + 1 <= 13 and sum(counts) == len(lengths)
    assert counts[0] and counts[-1]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        assert count == sum(low <= length < high for length in lengths)


def test_lengths_of_a_set_are_those_of_its_rows(settings: Any, data_cache: DataCache) -> None:
    prepared = data_cache.prepare(settings(n=16))
    lengths = [len(example.ids) for example in prepared.train]
    assert prepared.facts["train_lengths"] == length_histogram(lengths)
