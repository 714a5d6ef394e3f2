"""Reading, mapping and splitting rows: every bad input has an answer, every split its laws."""

from __future__ import annotations

import dataclasses
import gzip
import os
import random
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tinyllama_lab.config import DataConfig, part
from tinyllama_lab.errors import DataError
from tinyllama_lab.rows import Row, Turn, to_rows
from tinyllama_lab.sources import content_digest, load_rows, read_file, travel_file
from tinyllama_lab.splits import Split, check_enough, normalise, split_rows

ROOT = Path(__file__).parents[1]
ALPACA = ROOT.parent / "shared" / "data" / "alpaca_1k.jsonl"
CONF = ROOT / "conf" / "data"


def config(name: str = "file", **changes: Any) -> DataConfig:
    base = yaml.safe_load((CONF / "_base.yaml").read_text())
    own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    own.pop("defaults")
    columns = {**base["columns"], **own.get("columns", {}), **changes.pop("columns", {})}
    if name == "file":
        own["path"] = "never read"
    built: DataConfig = part(DataConfig, {**base, **own, **changes, "columns": columns})
    return built


def row(prompt: str, response: str = "yes", **changes: Any) -> Row:
    blank = Row(prompt, "", response, intent="", split="", messages=(), balance="")
    return dataclasses.replace(blank, **changes)


def many(count: int, **changes: Any) -> list[Row]:
    return [row(f"question {number}", f"answer {number}", **changes) for number in range(count)]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- reading -------------------------------------------------------------------------------

GOOD = {
    "a.jsonl": b'{"prompt": "q", "response": "r"}\n',
    "packed.jsonl": gzip.compress(b'{"prompt": "q", "response": "r"}'),  # its name does not say
    "utf16.jsonl": '{"prompt": "q", "response": "r"}'.encode("utf-16"),
    "no_newline.jsonl": b'{"prompt": "q", "response": "r"}',
    "bom_crlf_blank.jsonl": b'\xef\xbb\xbf\r\n{"prompt": "q", "response": "r"}\r\n  \r\n',
    "a.json": b'[{"prompt": "q",\n "response": "r"}]\n',
    "a.csv": b"\xef\xbb\xbfprompt, response\r\n\r\nq,r\r\n",
    "A.CSV": b'prompt,response\n"q","r"\n',
}


@pytest.mark.parametrize("name", GOOD)
def test_read_file_accepts(tmp_path: Path, name: str) -> None:
    assert read_file(write(tmp_path, name, GOOD[name])) == [{"prompt": "q", "response": "r"}]


BAD: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "at least one row.*empty file; correct data.path"),
    "blank.jsonl": (b"\n \r\n", "at least one row"),
    "blank.json": (b" \n", "at least one row"),
    "none.json": (b"[]", "at least one row"),
    "header_only.csv": (b"prompt,response\n", "at least one row"),
    "latin1.jsonl": (b'{"a": 1}\n{"a": "caf\xe9"}\n', r"UTF-8.*0xe9 at byte offset 19 \(line 2\)"),
    "bom_latin1.csv": (b"\xef\xbb\xbfa\n\xe9\n", r"UTF-8.*byte offset 5 \(line 2\).*iconv"),
    "nul.jsonl": (b'{"a": 1}\n{"a": "\0"}\n', "line 2 must be text, got a NUL byte; type tr -d"),
    "nul.csv": (b"a\n\0\n", "line 2 must be text, got a NUL byte"),
    "utf16_no_bom.csv": ("a\nb".encode("utf-16-le"), "line 1 must be text, got a NUL byte"),
    "comma.jsonl": (b'{"a": 1}\n\n{"a": 1,}\n', r"line 3 must be valid JSON, got '\{\"a\": 1,\}'"),
    "cut.jsonl": (b'{"a":\n', r"line 1 must be valid JSON.*Expecting value.*remove the line"),
    "escape.jsonl": (b'{"a": \x1b]0;hi\x07\n', r"got '\{\"a\": \\x1b\]0;hi\\x07'"),
    "bidi.jsonl": ('{"a" \u202e}'.encode(), r"got '\{\"a\" \\u202e\}'"),
    "array.jsonl": (b'{"a": 1}\n[1]\n', "line 2 must be an object of columns, got an array"),
    "number.jsonl": (b"17\n", "line 1 must be an object.*got a text or number; write"),
    "null.jsonl": (b"null\n", "line 1 must be an object.*got null"),
    "deep.jsonl": (b'{"a": ' + b"[" * 100_000, "line 1 .*nested too deeply; remove or flatten"),
    "deep.json": (b"[" * 100_000, "line 1 .*nested too deeply"),
    "object.json": (b'{"a": 1}', r"must hold an array of objects.*wrap the rows in \[...\]"),
    "item.json": (b'[{"a": 1}, 2]', "item 2 must be an object"),
    "more.csv": (b"a,b\n1,2\n1,2,3\n", "line 3 must have 2 fields.*got 3; put double quotes"),
    "fewer.csv": (b'a,b\n"x\ny",2\n1\n', "line 4 must have 2 fields.*got 1"),
    "quote.csv": (b'a,b\n1,"2\n', "line 2 must be valid CSV.*close the quotes"),
    "twice.csv": (b"a,a\n1,2\n", "must name each column once, got two called a; rename one"),
    "rows.parquet": (b"PAR1 no", "must be a Parquet file, got.*fetch or write it again"),
    "rows.txt": (b"hello", r"must end in .parquet, .jsonl.*, got '.txt'; where it is a table"),
    "rows.md": (b"hello", r"got '.md'; convert it"),
}


@pytest.mark.parametrize("name", BAD)
def test_read_file_refuses(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(DataError, match=message) as caught:
        read_file(write(tmp_path, name, content))
    assert str(caught.value).isprintable()  # one line, and nothing that moves a cursor


def test_read_file_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "none.jsonl", "No such file or directory; correct data.path"),
        (tmp_path / "folder", "must hold data files .*, got a folder without"),
        (tmp_path / "pipe.jsonl", "got no regular file"),
        (tmp_path / ("x" * 300 + ".jsonl"), "File name too long; correct data.path"),
        (Path("a\0.jsonl"), "null byte; correct data.path"),
    ):
        with pytest.raises(DataError, match=message):
            read_file(path)


def test_excerpt_of_a_long_line_is_80_characters(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_file(write(tmp_path, "a.jsonl", "x" * 10**6))
    assert "'" + "x" * 80 + "'" in str(caught.value)


@given(content=st.binary(max_size=200), suffix=st.sampled_from(["jsonl", "json", "csv"]))
def test_any_bytes_give_rows_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = write(tmp_path_factory.getbasetemp(), f"any.{suffix}", content)
    try:
        assert all(isinstance(record, dict) for record in read_file(path))
    except DataError:
        pass


def test_values_keep_their_spelling(tmp_path: Path) -> None:
    digits = "7" * 5000
    line = f'{{"prompt": {digits}, "response": 1e400, "x": NaN, "y": true, "z": null}}'
    records = read_file(write(tmp_path, "a.jsonl", line))
    columns = {"context": "x", "intent": "y", "split": "z"}
    rows, _ = to_rows(records, config(columns=columns))
    assert rows == [row(digits, "1e400", context="", intent="true", split="")]


def test_line_separators_inside_a_text_do_not_end_it(tmp_path: Path) -> None:
    line = '{"prompt": "a\u2028b\x85c", "response": "d"}'
    assert read_file(write(tmp_path, "a.jsonl", line))[0]["prompt"] == "a\u2028b\x85c"
    text = 'prompt,response\n"a\nb\u2028",' + "x" * 200_000
    assert read_file(write(tmp_path, "a.csv", text))[0]["prompt"] == "a\nb\u2028"


def test_parquet_has_the_same_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    records = [{"prompt": "q", "response": None, "n": 1, "messages": turns}]
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet") == records


# ---- mapping -------------------------------------------------------------------------------


def test_missing_columns_are_all_named_with_those_that_are_there() -> None:
    named = {"prompt": "prompt", "response": "response", "context": "notes"}
    data = config(columns=named, balance_by="topic")
    message = (
        "data.columns.prompt=prompt and data.columns.context=notes and data.balance_by=topic "
        "must name a column of the data, got a set with the columns: question, response; "
        "choose one with data.columns.prompt=..., or null"
    )
    with pytest.raises(DataError, match=message):
        to_rows([{"question": "q", "response": "r"}], data)
    with pytest.raises(DataError, match=r"columns: \(none\)"):
        to_rows([{}], data)


@pytest.mark.parametrize("value", [["q"], {"a": "q"}, b"\xff", ("q",)])
def test_one_cell_without_text_costs_one_row(value: Any) -> None:
    records = [{"prompt": "q", "response": "r"}, {"prompt": value, "response": "r"}]
    rows, dropped = to_rows(records, config())
    assert (rows, dropped, dropped.first) == ([row("q", "r")], {"not_text": 1}, {"not_text": 2})


@pytest.mark.parametrize(
    ("prompt", "response", "reason"),
    [
        (" \n", "r", "empty_prompt"),
        (None, "r", "empty_prompt"),
        ("q", "\u2003", "empty_response"),
        ("q", "An error: no", "error_text"),
        ("q", "caf\ufffd", "undecodable"),
        ("\ud800", "r", "undecodable"),
    ],
)
def test_unusable_rows_are_counted(prompt: str | None, response: str, reason: str) -> None:
    records: list[dict[str, Any]] = [
        {"prompt": prompt, "response": response},
        {"prompt": "q", "response": " r "},
    ]
    rows, dropped = to_rows(records, config(drop_containing=["ERROR:", ""]))
    assert rows == [row("q", " r ")]  # kept as it is, white space too
    assert dropped == Counter({reason: 1})


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}


def test_chat_rows() -> None:
    data = config(columns={"messages": "chat"})  # prompt and response need not be there
    rows, dropped = to_rows([{"chat": [USER, ANSWER]}], data)
    assert rows == [row("q", "r", messages=(Turn("user", "q"), Turn("assistant", "r")))]
    assert not dropped


BAD_CHATS: list[tuple[Any, str]] = [
    (None, "bad_messages"),
    ("text", "bad_messages"),
    ([], "bad_messages"),
    ([USER, "text"], "bad_messages"),
    ([USER], "no_assistant_turn"),
    ([ANSWER], "no_user_turn"),
    ([ANSWER, USER], "no_user_turn"),  # nobody asked before the last answer
    ([USER, {**ANSWER, "content": "  "}], "empty_response"),
    ([USER, {**ANSWER, "content": None}], "empty_response"),
    ([{**USER, "content": float("nan")}, ANSWER], "empty_prompt"),
    ([USER, {**ANSWER, "content": ""}, USER, ANSWER], "empty_turn"),
    ([{**USER, "role": "narrator"}, ANSWER], "unknown_role"),
    ([USER, {**ANSWER, "role": ["assistant"]}], "unknown_role"),
    ([USER, {"content": "r"}], "unknown_role"),
    ([USER, {**ANSWER, "content": {"a": 1}}], "not_text"),
    ([{**USER, "content": [{"type": "image_url", "image_url": {}}]}, ANSWER], "not_text"),
    ([USER, {**ANSWER, "weight": 0.5}], "bad_weight"),
    ([USER, {**ANSWER, "tool_calls": [{"arguments": {}}]}], "bad_tool_call"),
]


@pytest.mark.parametrize(("chat", "reason"), BAD_CHATS)
def test_a_bad_chat_is_one_row_less(chat: Any, reason: str) -> None:
    records = [{"chat": [USER, ANSWER]}, {"chat": chat}]
    rows, dropped = to_rows(records, config(columns={"messages": "chat"}))
    assert [each.number for each in rows] == [1]
    assert (dropped, dropped.first) == ({reason: 1}, {reason: 2})


# ---- splitting -----------------------------------------------------------------------------

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


# ---- sources -------------------------------------------------------------------------------


def test_a_local_source_is_read_and_known_by_its_content(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"prompt": "q"}')
    data = config(path=str(path))
    assert load_rows(data) == [{"prompt": "q"}]
    before = content_digest(data)
    assert before == content_digest(
        config(path=str(write(tmp_path, "b.jsonl", '{"prompt": "q"}')))
    )
    write(tmp_path, "a.jsonl", '{"prompt": "r"}')
    assert content_digest(data) != before


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
