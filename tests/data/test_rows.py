"""Reading and mapping rows: every bad input leads to a message or a counted reason."""

from __future__ import annotations

import dataclasses
import datetime as dt
import gzip
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tinyllama_lab.config.schema import DataConfig, part
from tinyllama_lab.data.rows import RawRow, Turn, to_rows
from tinyllama_lab.data.sources import content_digest, load_rows, read_file
from tinyllama_lab.errors import DataError

ROOT = Path(__file__).parents[2]
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


def row(prompt: str, response: str = "yes", **changes: Any) -> RawRow:
    blank = RawRow(prompt, "", response, intent="", split="", messages=(), balance="")
    return dataclasses.replace(blank, **changes)


def many(count: int, **changes: Any) -> list[RawRow]:
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
    "number.jsonl": (b"17\n", "line 1 must be an object.*got a string or number; write"),
    "null.jsonl": (b"null\n", "line 1 must be an object.*got null"),
    "deep.jsonl": (b'{"a": ' + b"[" * 100_000, "line 1 .*nested too deeply; remove or flatten"),
    "deep.json": (b"[" * 100_000, "line 1 .*nested too deeply"),
    "object.json": (b'{"a": 1}', r"must hold an array of objects.*wrap the rows in \[...\]"),
    "item.json": (b'[{"a": 1}, 2]', "item 2 must be an object"),
    "more.csv": (b"a,b\n1,2\n1,2,3\n", "line 3 must have 2 fields.*got 3; put double quotes"),
    "fewer.csv": (b'a,b\n"x\ny",2\n1\n', "line 4 must have 2 fields.*got 1"),
    "quote.csv": (b'a,b\n1,"2\n', "line 2 must be valid CSV.*close the quotes"),
    "twice.csv": (b"a,a\n1,2\n", "must name each column once, got two called a; rename one"),
    "rows.parquet": (b"PAR1 no", "must be a Parquet file, got.*download or write it again"),
    "rows.txt": (b"hello", r"must end in .parquet, .jsonl.*, got '.txt' .*; if it is a table"),
    "rows.md": (b"hello", r"got '.md' \(text without columns\); if it is a table"),
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


def test_every_type_of_parquet_is_text_or_not_text(tmp_path: Path) -> None:
    """The expected texts are written by hand; None means that the row is left out."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    ten = dt.datetime(2024, 1, 31, 10)
    typed: list[tuple[Any, list[Any], list[str]]] = [
        (
            arrow.float16(),
            [np.float16(1.1), np.float16(2.5), np.float16(0.1)],
            ["1.1", "2.5", "0.1"],
        ),
        (arrow.float16(), [np.float16(1), None, np.float16(3)], ["1", "3"]),
        (arrow.float32(), [1.1, 0.1, 3e38], ["1.1", "0.1", "3e+38"]),
        (arrow.uint64(), [2**64 - 1, None], ["18446744073709551615"]),
        (arrow.decimal256(50, 2), [Decimal("12.50"), None], ["12.50"]),
        (arrow.date64(), [ten.date()], ["2024-01-31"]),
        (arrow.timestamp("us", tz="UTC"), [ten, None], ["2024-01-31 10:00:00+00:00"]),
        (arrow.time32("s"), [ten.time()], ["10:00:00"]),
        (arrow.duration("ms"), [dt.timedelta(seconds=90)], ["0:01:30"]),
        (arrow.large_string(), ["a", None], ["a"]),
        (arrow.large_binary(), [b"a", b"\xff"], ["a"]),
        (arrow.binary(2), [b"hi"], ["hi"]),
        (arrow.dictionary(arrow.int8(), arrow.string()), ["a", None, "a"], ["a", "a"]),
        (arrow.null(), [None], []),
        (arrow.list_(arrow.null()), [[None], []], []),
        (arrow.struct([("a", arrow.float16())]), [{"a": None}, None], []),
        (arrow.map_(arrow.string(), arrow.int8()), [[("a", 1)], []], []),
    ]
    path = tmp_path / "a.parquet"
    for kind, values, texts in typed:
        cells = {"q": arrow.array(map(str, range(len(values)))), "r": arrow.array(values, kind)}
        parquet.write_table(arrow.table(cells), path)
        rows, _ = to_rows(read_file(path), config(columns={"prompt": "q", "response": "r"}))
        assert [each.response for each in rows] == texts, kind
    far = arrow.array([2**60], arrow.timestamp("us"))
    parquet.write_table(arrow.table({"when": far}), path)
    with pytest.raises(DataError, match="column 'when' must hold dates of the years 1 to 9999"):
        read_file(path)


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
    assert rows == [row("q", "r")]
    assert (dropped.facts, dropped.first) == ({"not_text": 1}, {"not_text": 2})


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
    assert dropped.facts == {reason: 1}


def test_a_row_without_any_cell_is_blank(tmp_path: Path) -> None:
    table = "prompt;response;notes\nq;r;\n;;\n\u200b; ;\n;r;\n;;n\n"
    _, dropped = to_rows(read_file(write(tmp_path, "a.csv", table)), config())
    assert dropped.facts == {"blank_row": 2, "empty_prompt": 2}
    assert dropped.reasons == ("2 blank rows (first: row 2), 2 empty prompts (first: row 4)")
    lines = write(tmp_path, "a.jsonl", '{"text": "t"}\n{}\n{"text": null}\n')
    assert to_rows(read_file(lines), config())[1].facts == {"blank_row": 1, "empty_text": 1}


UNSEEN = [
    "\u200b",
    "\ufeff \u2060",
    "\u00ad\n",
    "\x00\x1b",
    "\ufe0f",
    "\u0301",
    "\u3164",
    "\u00a0",
]


@pytest.mark.parametrize("unseen", UNSEEN)
def test_what_cannot_be_seen_is_missing(unseen: str) -> None:
    pairs = [("q", unseen), (unseen, "r"), ("q", "r")]
    rows, dropped = to_rows(
        [{"prompt": q, "response": r, "context": unseen, "system": unseen} for q, r in pairs],
        config(columns={"group": "context"}),
    )
    assert rows == [row("q", "r")]
    assert dropped.facts == {"empty_prompt": 1, "empty_response": 1}
    turns = [{"role": r, "content": unseen} for r in ("system", "user", "assistant")]
    chats = [turns, [*turns[:1], USER, ANSWER], [USER, turns[2]], [USER, turns[2], USER, ANSWER]]
    rows, dropped = to_rows([{"messages": chat} for chat in chats], config())
    assert [[turn.role for turn in each.messages] for each in rows] == [["user", "assistant"]]
    assert dropped.facts == {"empty_prompt": 1, "empty_response": 1, "empty_turn": 1}
    assert to_rows([{"text": unseen}, {"text": "t"}], config())[1].facts == {"empty_text": 1}


@pytest.mark.parametrize(
    "seen", ["\U0001f469\u200d\U0001f680", "\u2764\ufe0f", "\u0915\u093f", "."]
)
def test_what_can_be_seen_is_kept_as_it_is(seen: str) -> None:
    rows, _ = to_rows([{"prompt": f"\ufeff{seen}", "response": seen}], config())
    assert rows == [row(f"\ufeff{seen}", seen)]


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}


def test_chat_rows() -> None:
    data = config(columns={"messages": "chat"})  # prompt and response need not be there
    rows, dropped = to_rows([{"chat": [USER, ANSWER]}], data)
    assert rows == [row("q", "r", messages=(Turn("user", "q"), Turn("assistant", "r")))]
    assert dropped.facts == {}


BAD_CHATS: list[tuple[Any, str]] = [
    (None, "empty_chat"),
    (float("nan"), "empty_chat"),
    (" ", "empty_chat"),
    ("[]", "empty_chat"),
    ("text", "bad_messages"),
    ([], "empty_chat"),
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
    ([USER, {**ANSWER, "content": {"a": 1}}], "no_text_in_message"),
    ([{**USER, "content": [{"type": "image_url", "image_url": {}}]}, ANSWER], "image_in_message"),
    ([USER, {**ANSWER, "weight": 0.5}], "bad_weight"),
    ([USER, {**ANSWER, "tool_calls": [{"arguments": {}}]}], "bad_tool_call"),
]


@pytest.mark.parametrize(("chat", "reason"), BAD_CHATS)
def test_a_bad_chat_is_one_row_less(chat: Any, reason: str) -> None:
    records = [{"chat": [USER, ANSWER]}, {"chat": chat}]
    rows, dropped = to_rows(records, config(columns={"messages": "chat"}))
    assert [each.number for each in rows] == [1]
    assert (dropped.facts, dropped.first) == ({reason: 1}, {reason: 2})


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
