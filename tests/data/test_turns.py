"""Messages in all common formats: turns, weights, parts, tools, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.test_rows import config
from tests.records import Records, chat, rows_of
from tinyllama_lab.data.formats.cells import as_json
from tinyllama_lab.data.rows import to_rows
from tinyllama_lab.data.sources import read_path
from tinyllama_lab.errors import DataError


def turns_of(messages: Any, **beside: Any) -> list[tuple[Any, ...]]:
    """Return role, text, supervision and other template input of every turn."""
    rows, dropped = rows_of([{"messages": messages, **beside}], columns={"messages": "messages"})
    assert len(rows) == 1, dropped
    return [
        (
            turn.role,
            turn.content,
            *([] if turn.supervised else [False]),
            *([json.loads(turn.extra)] if turn.extra else []),
        )
        for turn in rows[0].messages
    ]


PLAIN = [("user", "q"), ("assistant", "r")]
SPELLED: list[Any] = [
    chat("q", "r"),
    json.dumps(chat("q", "r")),  # as a CSV has it
    str(chat("q", "r")),  # as pandas writes it into a CSV
    tuple(chat("q", "r")),
    np.array(chat("q", "r"), dtype=object),  # as pandas reads it from Parquet
    {"role": ["user", "assistant"], "content": ["q", "r"]},
    {"from": ["human", "gpt"], "value": ["q", "r"]},
    [{"role": "Human", "content": "q"}, {"role": " AI ", "content": "r"}],
    [{"from": "human", "value": "q"}, {"from": "chatgpt", "value": "r"}],
    [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "r"}]}],
    [{"human": "q", "assistant": "r"}],
    [{"role": "user", "content": [{"type": "text", "text": "q"}]}, *chat("", "r")[1:]],
    [{"role": "system", "content": None}, *chat("q", "r")],
    [{"sender": "human", "text": "q"}, {"sender": "assistant", "text": "r"}],
    [
        {"sender": "human", "text": "q", "content": []},
        {"sender": "AI", "body": "r", "type": "text"},
    ],
    [{"author": {"role": "user"}, "text": "q"}, {"author": {"role": "bot"}, "message": "r"}],
    [
        {"author": {"role": who}, "content": {"content_type": "text", "parts": [said]}}
        for who, said in (("user", "q"), ("assistant", "r"))
    ],
    [{"type": "human", "content": "q", "name": None}, {"type": "ai", "content": "r"}],
    [{"speaker": "user", "text": "q", "name": "Ann"}, {"speaker": "bot", "text": "r"}],
    [{"name": "user", "content": "q"}, {"name": "assistant", "content": "r"}],
    {"sender": ["human", "assistant"], "text": ["q", "r"]},
    [*chat("q", "r"), {"role": "user", "content": "thanks"}],  # cut: nothing of it is learned
    [*chat("q", "r"), {"role": "user", "content": ""}],
]


@pytest.mark.parametrize("messages", SPELLED, ids=lambda each: str(each)[:40])
def test_every_spelling_of_a_chat_is_the_same_chat(messages: Any) -> None:
    assert turns_of(messages) == PLAIN


@pytest.mark.parametrize(
    "answer",
    [
        '[{"from": "Pokhara", "to": "Kathmandu", "value": 3}]',
        '[{"role": "guide", "name": "Maya"}]',
        '[{"speaker": "user", "text": "q"}, {"speaker": "bot", "text": "r"}]',
        '[{"model": "X1"}, {"user": "Maya"}]',
        '{"role": ["a"], "content": ["b"]}',
        "[1, 2]",
        "{'a': 1}",
    ],
)
def test_an_answer_in_json_is_text(answer: str) -> None:
    (row,), _ = rows_of([{"prompt": "As JSON, please", "response": answer}])
    assert (row.response, row.messages) == (answer, ())


@pytest.mark.parametrize(
    "answer",
    [
        [{"type": "function", "text": "f"}, {"type": "tool", "text": "g"}],
        [{"name": "user", "value": 3}, {"name": "Maya", "value": 4}],
    ],
)
def test_other_lists_of_objects_are_no_chats(answer: list[dict[str, Any]]) -> None:
    record = {"prompt": "List them, please", "response": answer}
    with pytest.raises(DataError, match="got objects or lists in 'response'"):
        rows_of([record])


def test_an_unknown_speaker_makes_the_row_unusable() -> None:
    said = [{"sender": "human", "text": "q"}, {"sender": "assistant", "text": "r"}]
    strange = [said[0], {"sender": "Claude Shannon", "text": "r"}]
    nobody = [{"id": 1, "text": "q"}, said[1]]
    _, left_out = to_rows([{"messages": each} for each in (said, said, strange, nobody)], config())
    assert (left_out.facts, left_out.first) == ({"unknown_role": 2}, {"unknown_role": 3})
    assert "got 'Claude Shannon'" in left_out.details["unknown_role"]
    _, left_out = to_rows([{"m": nobody}], config(columns={"messages": "m"}))
    assert left_out.details["unknown_role"].endswith("got no role among the keys id, text")


def test_columns_are_recognised_in_records_that_pandas_read(tmp_path: Path) -> None:
    frame = pd.DataFrame({"messages": [chat("q", "r"), None], "n": [1, 2]})
    frame.to_parquet(tmp_path / "a.parquet")
    records = pd.read_parquet(tmp_path / "a.parquet").to_dict("records")
    assert isinstance(records[0]["messages"], np.ndarray)
    rows, dropped = rows_of(records)
    assert ([row.response for row in rows], dropped) == (["r"], {"empty_chat": 1})


def test_a_cut_chat_is_remembered_by_number() -> None:
    records = [{"messages": chat("q", "r")}, {"messages": chat("q", "r", "thanks")}]
    rows, dropped = to_rows(records, config())
    assert (len(rows), dropped.facts, dropped.shortened) == (2, {}, [2])


def test_parts_are_joined_and_developers_are_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    answer = {"role": "assistant", "content": 7}
    assert turns_of([*messages, answer]) == [("system", "s"), ("user", "abc"), ("assistant", "7")]


@pytest.mark.parametrize("key", ["weight", "train", "loss", "loss_mask"])
@pytest.mark.parametrize("written", ["0", "false", '"0"', "0.0"])
def test_a_turn_of_weight_zero_is_not_supervised(key: str, written: str) -> None:
    text = json.dumps(chat("q", "r", "s", "t")).replace('"r"', f'"r", "{key}": {written}')
    text = text.replace('"t"', f'"t", "{key}": 1')
    wanted = [("user", "q"), ("assistant", "r", False), ("user", "s"), ("assistant", "t")]
    assert turns_of(text) == wanted
    assert turns_of(json.loads(text)) == wanted


@pytest.mark.parametrize("weight", [0.5, 2, -1, "high", [1]])
def test_any_other_weight_makes_the_row_unusable(weight: Any) -> None:
    messages = chat("q", "r", "s", "t")
    messages[1]["weight"] = weight
    reason = "not_text" if isinstance(weight, list) else "bad_weight"
    assert rows_of([{"messages": messages}]) == ([], {reason: 1})
    detail = [*chat("q"), {**chat("", "r")[1], "train_detail": [{"begin_offset": 0}]}]
    assert rows_of([{"messages": detail}]) == ([], {"bad_weight": 1})


def test_a_masked_turn_is_not_supervised() -> None:
    messages = chat("q", "r", "s", "t")
    messages[1]["masked"], messages[3]["masked"] = True, False
    assert [turn[2:] for turn in turns_of(messages) if turn[0] == "assistant"] == [(False,), ()]
    messages[3]["masked"] = "partly"
    assert rows_of([{"messages": messages}]) == ([], {"bad_weight": 1})


def test_answers_in_a_prompt_are_not_supervised_as_in_trl() -> None:
    record = {"prompt": chat("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}
    (row,), _ = rows_of([record])
    assert [turn.supervised for turn in row.messages if turn.role == "assistant"] == [False, True]
    assert (row.prompt, row.response) == ("c", "d")
    (row,), _ = rows_of([{"prompt": chat("a"), "completion": "d"}, record])[0][:1], None
    assert [turn.content for turn in row.messages] == ["a", "d"]


CALL = {"name": "weather", "arguments": {"city": "Pokhara", "days": 2}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"z": 1, "a": None}}}
CALLED = {"type": "function", "function": CALL}


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALLED])},
        {"role": "assistant", "content": "", "function_call": CALL},
        {
            "role": "assistant",
            "tool_calls": [
                {**CALLED, "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}
            ],
        },
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "tool_call", "content": json.dumps([CALL])},
    ],
)
def test_tool_calls_come_in_the_form_that_templates_read(call: dict[str, Any]) -> None:
    result = {"role": "tool", "name": "weather", "tool_call_id": "7", "content": {"sun": True}}
    made = turns_of([*chat("q"), call, result, chat("", "It is sunny.")[1]])
    assert made[1] == ("assistant", "", {"tool_calls": [CALLED]})
    assert made[2] == ("tool", '{"sun": true}', {"name": "weather", "tool_call_id": "7"})
    assert turns_of([*chat("q"), call]) == made[:2]  # a call may be the whole answer


def test_tools_keep_order_nulls_and_numbers_of_the_data(tmp_path: Path) -> None:
    text = json.dumps(TOOL).replace('"z": 1', '"z": 1.50')
    line = f'{{"messages": {json.dumps(chat("q", "r"))}, "tools": [{text}]}}'
    (tmp_path / "a.jsonl").write_text(line)
    (row,), _ = rows_of(read_path(tmp_path / "a.jsonl"))
    assert row.tools == f"[{text}]"
    (row,), _ = rows_of([{"messages": chat("q", "r"), "tools": json.dumps([TOOL])}])
    assert json.loads(row.tools) == [TOOL]
    for empty in (None, "", [], float("nan")):
        records = [{"messages": chat("q", "r"), "tools": tools} for tools in (empty, [TOOL])]
        assert [bool(row.tools) for row in rows_of(records)[0]] == [False, True]
    records = [{"messages": chat("q", "r"), "tools": tools} for tools in ("words", [TOOL])]
    assert rows_of(records)[1] == {"bad_tools": 1}


def test_parquet_gives_objects_back_without_each_others_keys(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "time", "parameters": {"zone": "x"}}}
    first = {"type": "function", "function": {"name": "weather", "parameters": {"city": "y"}}}
    messages = [*chat("q"), {"role": "assistant", "content": "r", "weight": 0}]
    frame = pd.DataFrame({"messages": [messages, chat("q", "r")], "tools": [[first], [other]]})
    frame.to_parquet(tmp_path / "a.parquet")
    rows, _ = rows_of(read_path(tmp_path / "a.parquet"))
    assert [json.loads(row.tools) for row in rows] == [[first], [other]]
    assert [row.messages[1].supervised for row in rows] == [False, True]


def test_deep_nesting_makes_a_row_unusable_without_a_traceback() -> None:
    deep: Any = "q"
    for _ in range(5000):
        deep = [deep]
    record = {"messages": chat("q", "r"), "tools": [TOOL]}
    for bad in ({"messages": deep}, {"messages": [{"role": "tool", "content": deep}]}):
        assert rows_of([record, {**record, **bad}])[1].keys() <= {"bad_messages", "not_text"}
    assert rows_of([record, {**record, "tools": [{"a": deep}]}])[1] == {"bad_tools": 1}
    assert rows_of([record, {**record, "messages": "[" * 10**5}])[1] == {"bad_messages": 1}


def test_json_of_any_cell_is_json() -> None:
    value: Mapping[str, Any] = {"a": [1, 2.5, None, True, "é"], "b": np.array([1, 2])}
    assert json.loads(as_json(value)) == {"a": [1, 2.5, None, True, "é"], "b": [1, 2]}


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "weight", "tool_calls", "name"]),
            inner | st.sampled_from(["user", "assistant", "tool", "function_call"]),
            max_size=3,
        )
    ),
    max_leaves=8,
)
SOURCES = ["messages", "prompt", "response", "text", "system", "tools"]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(SOURCES), anything, max_size=3), max_size=4),
)
def test_any_record_becomes_a_row_or_is_counted_or_refused(records: Records) -> None:
    try:
        rows, dropped = to_rows(records, config())
    except DataError:
        return
    assert len(rows) + dropped.counts.total() == len(records)
    for row in rows:
        assert row.response.strip() or json.loads(row.messages[-1].extra)["tool_calls"]
        assert all(json.loads(turn.extra or "{}") is not None for turn in row.messages)
