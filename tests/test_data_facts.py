"""What a result says about its data: no row is in both parts, and how long the rows are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama_lab.config import DataConfig, part
from tinyllama_lab.core.data import DataCache, count_overlap, length_histogram
from tinyllama_lab.rows import Row, Turn

ROW = Row("Where to?", "A map.", "To Pokhara.", "route", "", (), "")
TURNS = (
    Turn("user", "one"),
    Turn("assistant", "two"),
    Turn("user", "three"),
    Turn("assistant", "four"),
)
CHAT = dataclasses.replace(ROW, prompt="three", response="four", messages=TURNS)


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
        dataclasses.replace(CHAT, messages=(Turn("user", "ONE"), *TURNS[1:])),
    ]
    assert [count_overlap([row], [ROW, CHAT]) for row in other] == [1, 1, 0, 0, 0, 1]
    assert count_overlap(other, [ROW, CHAT]) == 3
    assert count_overlap([], [ROW]) == count_overlap(other, []) == 0


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
