"""Columns are recognised by their names and contents; a refusal says what to type."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.data.test_rows import config
from tests.data.test_splits import ALPACA
from tests.records import chat, columns, rows_of
from tinyllama_lab.data.formats.detection import recognise
from tinyllama_lab.data.rows import to_rows
from tinyllama_lab.data.sources import read_path
from tinyllama_lab.errors import DataError

RECOGNISED: list[tuple[dict[str, Any], dict[str, str], str]] = [
    (
        {"instruction": "i", "input": "", "output": "o", "text": "i o"},
        {"prompt": "instruction", "context": "input", "response": "output"},
        "Alpaca rows in the columns 'instruction', 'input' and 'output'; not used: text",
    ),
    (
        {"prompt": "q", "response": "r"},
        {"prompt": "prompt", "response": "response"},
        "prompts and responses in the columns 'prompt' and 'response'",
    ),
    (
        {"prompt": "q", "completion": "r", "id": 7},
        {"prompt": "prompt", "response": "completion"},
        "prompts and responses in the columns 'prompt' and 'completion'; not used: id",
    ),
    (
        {"Question": "q", "ANSWER": "r"},
        {"prompt": "Question", "response": "ANSWER"},
        "prompts and responses in the columns 'Question' and 'ANSWER'",
    ),
    (
        {"instruction": "i", "context": "c", "response": "o", "category": "x"},
        {"prompt": "instruction", "context": "context", "response": "response"},
        "the columns 'instruction', 'context' and 'response'; not used: category",
    ),
    (
        {"input": "q", "output": "r"},
        {"prompt": "input", "response": "output"},
        "prompts and responses in the columns 'input' and 'output'",
    ),
    (
        {"messages": chat("q", "r"), "prompt": "q"},
        {"messages": "messages"},
        "chat messages in column 'messages'; not used: prompt",
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
        {"messages": "conversations"},
        "ShareGPT conversations in column 'conversations'",
    ),
    (
        {"conversations": chat("q", "r")},
        {"messages": "conversations"},
        "chat messages in column 'conversations'",
    ),
    (
        {"prompt": chat("q"), "completion": [{"role": "assistant", "content": "r"}]},
        {"prompt": "prompt", "response": "completion"},
        "conversations in the columns 'prompt' and 'completion'",
    ),
    (
        {"system_prompt": "s", "question": "q", "response": "r"},
        {"prompt": "question", "response": "response", "system": "system_prompt"},
        "the columns 'question' and 'response'; system turns in 'system_prompt'",
    ),
    (
        {"messages": chat("q", "r"), "tools": '[{"name": "f"}]', "split": "train"},
        {"messages": "messages", "tools": "tools", "split": "split"},
        "chat messages in column 'messages'; tools in 'tools'; the split in 'split'",
    ),
    ({"text": "t", "url": "u"}, {"text": "text"}, "ready-made text in column 'text'"),
]


@pytest.mark.parametrize(("record", "wanted", "line"), RECOGNISED)
def test_plain_names_are_recognised_and_described(
    record: dict[str, Any], wanted: dict[str, str], line: str
) -> None:
    data, note = recognise([record] * 3, config())
    assert columns([record] * 3) == wanted
    assert line in note and note.startswith("data: recognised ") and note.isprintable()
    assert data.style == ("text" if "text" in wanted else "chat")
    again, _ = recognise([record] * 3, data)
    assert again == data
    (row, *_), dropped = rows_of([record] * 3)
    assert (row.response, dropped) == ("t" if "text" in wanted else row.response, {})
    assert row.response in ("o", "r", "t")


def test_one_row_of_another_kind_changes_nothing() -> None:
    for bad in (None, "text", [], [{"role": "user"}], 7):
        records = [{"messages": chat("q", str(n))} for n in range(40)]
        records[16] = {"messages": bad}
        rows, dropped = to_rows(records, config())
        assert (len(rows), list(dropped.first.values())) == (39, [17])


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"Frage": "q x", "Antwort": "r"}, "Antwort ('r'), whose", "prompt=Frage response=Antwort"),
    ({"id": 4, "a": "q x", "b c": "r"}, "id ('4'), a ('q x'), b c", "prompt=a 'response=b c'"),
    ({"Nr.": "K-66", "F": "Wo?", "A": "Da."}, "Nr. ('K-66'), F", "prompt=F response=A"),
    (
        {"on": "01.02.2024", "F": "Wo ist es?", "A": "Da."},
        "on ('01.02.2024')",
        "prompt=F response=A",
    ),
    ({"body": "words"}, "body ('words'), whose", "text=body"),
]


@pytest.mark.parametrize(("record", "there", "typed"), REFUSED)
def test_what_a_refusal_says_to_type_works(record: dict[str, Any], there: str, typed: str) -> None:
    with pytest.raises(DataError) as caught:
        recognise([record], config())
    message = str(caught.value)
    assert there in message and message.isprintable()
    parse = OverridesParser.create().parse_override
    told = [parse(word) for word in shlex.split(message.rpartition("; for example, type ")[2])]
    settings = {each.key_or_group: str(each.value()) for each in told}
    names = {f"data.columns.{k}": v for k, _, v in (w.partition("=") for w in shlex.split(typed))}
    assert {k: v for k, v in settings.items() if k != "data.style"} == names
    style = settings.get("data.style", "chat")
    chosen = {key.rpartition(".")[2]: name for key, name in names.items()}
    rows, _ = rows_of([record], columns=chosen, style=style)
    assert len(rows) == 1


def test_a_column_that_groups_rows_is_still_a_text() -> None:
    records = [{"question": f"q {n}", "context": "c", "answer": "a"} for n in range(4)]
    data, _ = recognise(records, config(columns={"group": "context"}))
    columns = data.columns
    assert (columns.prompt, columns.context, columns.response) == ("question", "context", "answer")
    assert columns.group == "context"


def test_a_refusal_suggests_no_categories_and_names_unknown_speakers() -> None:
    records = [{"topic": "trek", "F": f"Wo {n}?", "A": f"Da {n}."} for n in range(20)]
    with pytest.raises(DataError, match="type data.columns.prompt=F data.columns.response=A$"):
        recognise(records, config())
    records = [{"n": n, "topic": "trek", "F": f"Wo {n}?"} for n in range(20)]
    with pytest.raises(DataError, match="type data.columns.text=F data.style=text$"):
        recognise(records, config())
    records = [{"n": n, "topic": "trek"} for n in range(20)]
    with pytest.raises(DataError, match="name two of these in data.columns.prompt=... and"):
        recognise(records, config())
    strange = [{"role": "Kunde", "content": "q"}, {"role": "Agent", "content": "r"}]
    with pytest.raises(
        DataError, match="must be system, user, assistant or tool.* got Kunde, Agent;"
    ):
        recognise([{"messages": strange}], config())
    with pytest.raises(DataError, match="first line of the file seems to hold data"):
        recognise([{"What is it?": "Where is it?", "It is here.": "There."}], config())


@pytest.mark.parametrize(
    ("record", "key", "names"),
    [
        ({"prompt": "q", "answer": "a", "response": "r"}, "response", ["answer", "response"]),
        ({"prompt": "q", "question": "p", "answer": "a"}, "prompt", ["prompt", "question"]),
        ({"messages": chat("q", "r"), "chat": chat("q", "r")}, "messages", ["messages", "chat"]),
        ({"text": "q", "response": "a", "output": "r", "input": "i"}, "response", ["response"]),
    ],
)
def test_two_columns_that_fit_are_both_named(
    record: dict[str, Any], key: str, names: list[str]
) -> None:
    with pytest.raises(DataError, match=f"data.columns.{key} must name one column") as caught:
        recognise([record], config())
    assert all(f"data.columns.{key}={name}" in str(caught.value) for name in names)
    settled = columns([record], columns={key: names[0]})
    assert settled[key] == names[0]


def test_a_header_that_is_data_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("What is the capital of France?,Paris\nAnd of Italy?,Rome\n")
    with pytest.raises(DataError, match="hold data: if it does, add a line"):
        recognise(read_path(tmp_path / "a.csv"), config())


def test_a_part_may_be_typed_and_an_empty_value_is_no_column() -> None:
    record = {"instruction": "i", "input": "c", "notes": "n", "output": "o"}
    typed = columns([record], columns={"context": "notes"})
    assert typed == {"prompt": "instruction", "context": "notes", "response": "output"}
    assert "context" not in columns([record], columns={"context": ""})
    assert columns([record], columns={"prompt": "notes"})["response"] == "output"
    messages = {"messages": chat("q", "r"), "system": "s"}
    assert columns([messages], columns={"system": ""}) == {"messages": "messages"}


EXPORT = {
    "uuid": "0f",
    "name": "A trip",
    "account": {"uuid": "7c"},
    "chat_messages": [
        {
            "uuid": f"{n}",
            "text": text,
            "content": [{"type": "text", "text": text}],
            "sender": ("human", "assistant")[n % 2],
            "created_at": "2025-01-31",
        }
        for n, text in enumerate(("q", "r", "q 2", "r 2"))
    ],
}


def test_a_claude_export_is_read() -> None:
    data, note = recognise([EXPORT] * 3, config())
    assert data.columns.messages == "chat_messages"
    assert note == (
        "data: recognised chat messages in column 'chat_messages'; not used: uuid, name, account"
    )
    (row, *_), dropped = rows_of([EXPORT] * 3)
    said = [(turn.role, turn.content) for turn in row.messages]
    assert dropped == {} and said == [
        ("user", "q"),
        ("assistant", "r"),
        ("user", "q 2"),
        ("assistant", "r 2"),
    ]
    assert rows_of([EXPORT], columns={"messages": "chat_messages"})[0] == [row]


@pytest.mark.parametrize("name", ["turns", "history", "thread", "log", "dialog"])
def test_the_only_column_of_chats_is_found_whatever_its_name(name: str) -> None:
    assert columns([{name: chat("q", "r"), "n": 1}]) == {"messages": name}
    assert columns([{name: json.dumps(chat("q", "r"))}]) == {"messages": name}
    pair = {"question": "q", "answer": "r"}
    if name not in ("dialog", "history"):  # a name that says it, and one that is refused
        assert columns([{**pair, name: chat("q", "r")}]) == {
            "prompt": "question",
            "response": "answer",
        }
    if name != "dialog":
        with pytest.raises(DataError, match=f"type data.columns.messages={name}$"):
            recognise([{name: chat("q", "r"), "other": chat("q", "r")}], config())


def test_messages_are_suggested_where_other_columns_were_typed() -> None:
    named = {"prompt": "prompt", "response": "response"}
    with pytest.raises(DataError, match="type data.columns.messages=messages$"):
        to_rows([{"messages": chat("q", "r")}], config(columns=named))


def test_a_style_that_cannot_carry_what_is_there_is_refused() -> None:
    chats = [{"messages": chat("q", "r")}]
    with pytest.raises(DataError, match="data.columns.messages=messages data.style=chat"):
        recognise(chats, config(style="instruction_response"))
    pairs = [{"system": "s", "prompt": chat("q"), "response": "r"}]
    assert rows_of(pairs, style="instruction_response") == ([], {"needs_style_chat": 1})
    _, note = recognise(pairs, config(style="instruction_response"))
    assert "not used: system" in note


def test_control_characters_of_a_name_are_escaped() -> None:
    with pytest.raises(DataError) as caught:
        recognise([{"a\x1b[2J\0": "q", "b": "r s"}], config())
    assert "a\\x1b[2J\\x00" in str(caught.value)


@pytest.mark.skipif(not ALPACA.is_file(), reason=f"{ALPACA} is not on this machine")
def test_alpaca_needs_no_column() -> None:
    records = read_path(ALPACA)
    assert columns(records) == {"prompt": "instruction", "context": "input", "response": "output"}
    lines = [json.loads(line) for line in ALPACA.read_text().splitlines()]
    rows, dropped = to_rows(records, config())
    wanted = [(r["instruction"], r["output"]) for r in lines if r["output"].strip()]
    assert [(row.prompt, row.response) for row in rows] == wanted
    assert len(rows) + dropped.counts.total() == len(lines)
