"""Chats inside objects, and chats as pairs of question and answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_rows import config
from tests.records import chat, columns, rows_of, written
from tinyllama_lab.data.formats.detection import recognise
from tinyllama_lab.data.sources import read_path
from tinyllama_lab.errors import DataError

# as Open WebUI exports a chat
EXPORT: dict[str, Any] = {
    "id": "1",
    "title": "About tea",
    "chat": {
        "title": "About tea",
        "models": ["llama"],
        "history": {"currentId": "b", "messages": {"a": {"role": "user", "content": "q"}}},
        "messages": [{"id": "a", "timestamp": 7, **turn} for turn in chat("q", "r", "q 2", "r 2")],
    },
    "updated_at": 1,
    "share_id": None,
    "archived": False,
    "pinned": False,
    "meta": {},
}
TURNS = [("user", "q"), ("assistant", "r"), ("user", "q 2"), ("assistant", "r 2")]


def turns_of(record: dict[str, Any], **changes: Any) -> list[tuple[str, str]]:
    """Return the turns of a data set of equal rows, none of which may be left out."""
    rows, dropped = rows_of([record] * 2, **changes)
    assert dropped == {} and len(rows) == 2
    return [(turn.role, turn.content) for turn in rows[0].messages]


def refusal(record: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        rows_of([record] * 3, **changes)
    return str(caught.value)


@pytest.mark.parametrize("name", [None, "chat", "chat.messages"])
def test_an_export_of_open_webui_is_read(name: str | None) -> None:
    there = {"messages": name} if name else {}
    assert turns_of(EXPORT, columns=there) == TURNS
    assert columns([EXPORT] * 3, columns=there) == {"messages": "chat.messages"}
    assert turns_of({**EXPORT, "chat": json.dumps(EXPORT["chat"])}, columns=there) == TURNS
    _, line = recognise([EXPORT], config(columns=there))
    assert "title" in line and "not used" in line and "chat," not in line


@pytest.mark.parametrize("outer", ["conversation", "data", "chat", "export"])
def test_the_only_chat_in_an_object_is_found(outer: str) -> None:
    assert turns_of({outer: {"messages": chat("q", "r", "q 2", "r 2"), "n": 1}}) == TURNS
    assert turns_of({outer: {"log": {"turns": chat("q", "r", "q 2", "r 2")}}}) == TURNS


@pytest.mark.parametrize("name", ["one.json", "all.json", "all.jsonl"])
def test_one_exported_chat_is_one_row(tmp_path: Path, name: str) -> None:
    top = EXPORT if name == "one.json" else [EXPORT]
    (tmp_path / name).write_text(json.dumps(top, indent=2))
    records = read_path(tmp_path / name)
    assert len(records) == 1 and turns_of(records[0]) == TURNS


def test_what_is_typed_for_a_chat_in_an_object_is_corrected_or_chosen() -> None:
    assert "type data.columns.messages=chat.messages" in refusal(
        EXPORT, columns={"messages": "chat.mesages"}
    )
    two = {"a": {"messages": chat("q", "r")}, "b": {"turns": chat("q", "r")}}
    ways = "type data.columns.messages=a.messages or data.columns.messages=b.turns"
    assert refusal(two).endswith(ways)
    assert len(turns_of(two, columns={"messages": "b.turns"})) == 2
    assert len(turns_of(two, columns={"messages": "b"})) == 2
    both = {"log": {"old": chat("q", "r"), "new": chat("q", "r")}}
    assert "log.old" in refusal(both, columns={"messages": "log"})
    assert refusal(EXPORT, style="instruction_response").endswith(
        "type data.columns.messages=chat.messages data.style=chat"
    )


def test_a_chat_without_its_answer_is_not_taken_for_a_whole_one() -> None:
    logged = {
        "request": {"messages": chat("q", "r", "q 2")},
        "response": {"choices": [{"message": {"content": "r 2"}}]},
    }
    assert "must hold the answer to train on, got chats in 'request.messages'" in refusal(logged)


def test_other_columns_take_precedence_over_chats_in_objects() -> None:
    record = {"question": "q", "answer": "r", "meta": {"messages": chat("a", "b")}}
    assert columns([record]) == {"prompt": "question", "response": "answer"}
    preferred = {f"{side}": {"messages": chat("q", side)} for side in ("chosen", "rejected")}
    assert "chosen.messages" in refusal(preferred)


def test_true_and_false_are_not_text() -> None:
    record = {"id": 7, "chat": {"note": "n"}, "archived": False, "pinned": True}
    assert "archived" not in refusal(record) and "pinned" not in refusal(record)
    assert "response=" not in refusal({"id": 7, "archived": False, "pinned": "True"}).replace(
        "response=...", ""
    )


# ---- pairs ---------------------------------------------------------------------------------

PAIRS = [["q", "r"], ["q 2", "r 2"], ["q 3", None]]


@pytest.mark.parametrize("name", ["history", "chat_history", "chatbot", "conversation"])
@pytest.mark.parametrize("is_typed", [True, False])
def test_pairs_are_turns(name: str, is_typed: bool) -> None:
    asked = {"columns": {"messages": name}} if is_typed else {}
    for cell in (PAIRS, [tuple(pair) for pair in PAIRS], json.dumps(PAIRS)):
        assert turns_of({name: cell, "id": 7}, **asked) == TURNS
    greeted = turns_of({name: [[None, "hello"], *PAIRS]}, **asked)
    assert greeted == [("assistant", "hello"), *TURNS]


def test_a_file_of_one_chat_in_pairs_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"history": PAIRS[:2]}))
    (record,) = read_path(tmp_path / "a.json")
    assert turns_of(record) == TURNS
    assert turns_of(read_path(written(tmp_path, [{"history": PAIRS}]))[0]) == TURNS


def test_pairs_beside_the_last_turn_are_only_its_beginning() -> None:
    apart = "got earlier turns apart from the last (column 'history')"
    for beside in ({"prompt": "q 3"}, {"question": "q 3", "answer": "r"}, {"last_said": "a b c"}):
        assert apart in refusal({**beside, "history": PAIRS})


def test_texts_without_speakers_are_refused() -> None:
    message = refusal({"history": ["q", "r"], "id": 7})
    assert "must say who speaks, got lists of texts in 'history'; write each row as" in message
