"""Message contents in parts: text is read, thinking is ignored, other parts exclude the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet
import pytest

from tests import grid
from tests.data.test_rows import config
from tests.data.test_turns import turns_of
from tests.records import chat, rows_of
from tinyllama_lab.config.schema import load
from tinyllama_lab.data.sources import read_path
from tinyllama_lab.data.splits.enough import check_enough
from tinyllama_lab.data.splits.splits import split_records
from tinyllama_lab.errors import DataError
from tinyllama_lab.study.trial import trial_key
from tinyllama_lab.sweep.settings.identify import Identifier

TEXT = {"type": "text", "text": "r"}
THOUGHTS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "secret", "signature": "s"},
    {"type": "redacted_thinking", "data": "secret"},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "secret"}]},
    {"type": "reasoning", "text": "secret"},
    {"type": "thinking", "thinking": [{"type": "text", "text": "secret"}]},
    {"text": "secret", "thought": True},
    {"content_type": "thoughts", "thoughts": [{"content": "secret"}]},
]
OTHERS: list[tuple[Any, str, str]] = [
    ({"type": "image", "source": {}}, "image_in_message", "with an image in a message"),
    ({"type": "image_url", "image_url": {}}, "image_in_message", "image in a message"),
    ({"type": "input_image", "file_id": "f"}, "image_in_message", "image in a message"),
    ({"content_type": "image_asset_pointer"}, "image_in_message", "image in a message"),
    ({"type": "document", "source": {}}, "document_in_message", "document in a message"),
    ({"type": "input_file", "file_id": "f"}, "document_in_message", "document in a message"),
    ({"type": "input_audio", "input_audio": {}}, "audio_in_message", "audio in a message"),
    ({"type": "video_url", "video_url": {}}, "video_in_message", "video in a message"),
    ({"type": "tool_use", "name": "f", "input": {}}, "tool_use_in_message", "tool use in a"),
    (
        {"thoughtSignature": "s", "functionCall": {"name": "f"}},
        "tool_use_in_message",
        "tool use in a message",
    ),
    ({"type": "tool_result", "content": "x"}, "tool_result_in_message", "tool result in a"),
    ({"type": "web_search_tool_result"}, "tool_result_in_message", "tool result in a message"),
    ({"type": "file_search_call", "queries": []}, "tool_use_in_message", "tool use in a message"),
    ({"type": "function_call_output"}, "tool_result_in_message", "tool result in a message"),
    ({"type": "imageUrls", "files": []}, "image_in_message", "image in a message"),
    ({"type": "profile_link"}, "no_text_in_message", "something other than text in a message"),
    ({"reasoning": "r"}, "no_text_in_message", "something other than text in a message"),
    ({"text": None, "functionCall": {"name": None}}, "no_text_in_message", "other than text"),
    ({"type": "map"}, "no_text_in_message", "something other than text in a message"),
    ({"type": "text", "text": ["r"]}, "no_text_in_message", "something other than text"),
    (7, "no_text_in_message", "something other than text in a message"),
]


def answered(*parts: Any) -> list[dict[str, Any]]:
    return [*chat("q"), {"role": "assistant", "content": list(parts)}]


@pytest.mark.parametrize("thought", THOUGHTS)
def test_thinking_is_skipped(thought: dict[str, Any]) -> None:
    assert turns_of(answered(thought, TEXT)) == [("user", "q"), ("assistant", "r")]
    assert rows_of([{"messages": answered(thought)}]) == ([], {"empty_response": 1})
    middle = [*answered(thought), *chat("s", "t")]
    assert rows_of([{"messages": middle}]) == ([], {"empty_turn": 1})


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([TEXT, {"type": "output_text", "text": " s"}], "r s"),
        ([{"type": "refusal", "refusal": "No."}], "No."),
        ([TEXT, {"type": "token_budget", "remaining": 9}], "r"),
        ([TEXT, {"type": "text", "text": None}, "t"], "rt"),
        ([{"type": "text", "text": 1250}], "1250"),
        ([{"type": None, "text": "r"}], "r"),
    ],
)
def test_parts_that_are_text_are_joined(parts: list[Any], text: str) -> None:
    assert turns_of(answered(*parts))[1] == ("assistant", text)


@pytest.mark.parametrize(("value", "text"), [(1250, "1250"), (True, "true"), (0.5, "0.5")])
def test_numbers_and_booleans_are_text_as_in_a_column(value: Any, text: str) -> None:
    assert turns_of([*chat("q"), {"role": "assistant", "content": value}])[1][1] == text
    (row,), _ = rows_of([{"prompt": "q", "response": value}])
    assert row.response == text


@pytest.mark.parametrize(("part", "reason", "words"), OTHERS)
def test_any_other_part_makes_the_row_unusable_and_is_named(
    part: Any, reason: str, words: str
) -> None:
    records = [{"messages": answered(*beside)} for beside in ([TEXT, part], [part])]
    records.append({"messages": [{"role": "user", "content": ["q", part]}, *answered(TEXT)]})
    assert rows_of(records) == ([], {reason: 3})
    data = config(eval_n=1)
    with pytest.raises(DataError) as caught:
        check_enough(split_records(records, data), data, "data=file")
    assert words in str(caught.value) and "json" not in str(caught.value)


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"inlineData": {"mimeType": "image/png", "data": "x"}}, "image_in_message"),
        ({"inlineData": {"mimeType": "audio/wav"}, "thought": False}, "audio_in_message"),
        ({"inline_data": {"mime_type": "video/mp4"}}, "video_in_message"),
        ({"fileData": {"mimeType": "video/mp4", "fileUri": "f"}}, "video_in_message"),
        ({"inlineData": {"mimeType": "application/pdf"}}, "document_in_message"),
        ({"inlineData": {"mimeType": "text/csv"}}, "document_in_message"),
        ({"thoughtSignature": "s", "functionCall": {"name": "f"}}, "tool_use_in_message"),
        ({"functionResponse": {"name": "f"}}, "tool_result_in_message"),
        ({"thoughtSignature": "s", "executableCode": {"code": "1"}}, "no_text_in_message"),
    ],
)
@pytest.mark.parametrize("null", [None, float("nan")])
def test_keys_without_a_value_do_not_name_a_part(
    held: dict[str, Any], reason: str, null: Any
) -> None:
    keys = ("text", "thought", "thoughtSignature", "inlineData", "functionCall")
    part = dict.fromkeys(keys, null) | held
    assert rows_of([{"messages": answered(TEXT, part)}]) == ([], {reason: 1})
    assert rows_of([{"messages": answered(dict.fromkeys(keys, null) | {"text": "r"})}])[1] == {}


def test_parts_of_gemini_in_parquet_are_named_as_in_json(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {"inlineData": {"mimeType": "image/png"}},
        {"functionCall": {"name": "f"}},
        {"text": "secret", "thought": True},
    ]
    records = []
    for n in range(60):
        parts = [*others[n : n + 1], {"text": f"answer {n}."}]
        turns = [("user", [{"text": f"question {n}?"}]), ("model", parts)]
        records.append({"contents": [{"role": role, "parts": said} for role, said in turns]})
    pd.DataFrame(records).to_parquet(tmp_path / "a.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()  # as of `datasets`
    assert table[0]["contents"][1]["parts"][0]["thought"] is None
    for each in (records, read_path(tmp_path), table):
        split = split_records(each, config(eval_n=4))
        assert split.dropped.facts == {"image_in_message": 1, "tool_use_in_message": 1}
        assert "data: thinking of 1 answer is not used" in split.notes


def test_thinking_is_counted_in_answers_alone() -> None:
    records = export(40, thinking=2)
    for record in records[10:20]:
        record["chat_messages"][0]["content"].append({"type": "thinking", "thinking": "?"})
    assert "data: thinking of 2 answers is not used" in split_records(records, config()).notes


def test_what_a_tool_returns_stays_json() -> None:
    parts = [{"type": "image", "url": "x"}, {"type": "text", "text": "y"}]
    result = {"role": "tool", "content": parts}
    assert turns_of([*chat("q"), result, *chat("", "r")[1:]])[1] == ("tool", json.dumps(parts))


def test_a_part_after_the_last_answer_marks_the_row_as_newly_read() -> None:
    tail = {"role": "user", "content": [THOUGHTS[0]]}
    (row,), _ = rows_of([{"messages": [*chat("q", "r"), tail]}])
    assert row.is_newly_read and not any(turn.has_thinking for turn in row.messages)


@pytest.mark.parametrize(
    ("part", "is_newly_read"),
    [
        (TEXT, False),
        ({"text": "r"}, False),
        ({"type": "", "text": "r"}, False),
        ("r", False),
        ({"type": None, "text": "r"}, True),
        ({"type": float("nan"), "text": "r"}, True),
        ({"type": pd.NA, "text": "r"}, True),
        ({"type": "text", "text": None}, True),
        ({"type": "refusal", "refusal": "r"}, True),
        (THOUGHTS[0], True),
        ({"text": "s", "thought": True}, True),  # which was text
    ],
)
def test_a_row_that_is_read_differently_than_before_is_marked(
    part: Any, is_newly_read: bool
) -> None:
    (row,), _ = rows_of([{"messages": answered(TEXT, part)}])
    assert row.is_newly_read is is_newly_read
    result = {"role": "tool", "content": [TEXT, part]}  # JSON before, where it was no text
    (row,), _ = rows_of([{"messages": [*chat("q"), result, *answered(TEXT)[1:]]}])
    assert row.is_newly_read is is_newly_read and row.messages[1].content.startswith("r")


# ---- an export of Claude -----------------------------------------------------------------------


def export(
    count: int, thinking: int = 0, images: int = 0, attached: int = 0, untyped: int = 0
) -> list[Any]:
    """Return conversations: the first has thinking, the last an image, from the third attachments.

    The type of the first `untyped` questions is null.

    The answers end with an unanswered question that has an attachment.
    """
    conversations = []
    for n in range(count):
        kind = None if n < untyped else "text"
        asked: list[dict[str, Any]] = [{"type": kind, "text": f"question {n}?"}]
        asked += [{"type": "image"}] * (n >= count - images)
        thought = [{"type": "thinking", "thinking": f"secret {n}"}] * (n < thinking)
        files = [{"file_name": "a.txt", "extracted_content": "long"}]
        messages = [
            ("human", asked, files * (2 <= n < 2 + attached)),
            ("assistant", [*thought, {"type": "text", "text": f"answer {n}."}], []),
            ("human", [{"type": "text", "text": "?"}], files),
        ]
        keys = ("sender", "content", "attachments")
        chats = [dict(zip(keys, each, strict=True), text="") for each in messages]
        conversations.append({"uuid": str(n), "chat_messages": chats})
    return conversations


def test_unused_parts_are_reported_once(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(export(40, thinking=8, images=3, attached=5)))
    split = split_records(read_path(tmp_path / "a.json"), config(eval_n=4))
    rows = [*split.train, *split.heldout]
    assert {row.response for row in rows} == {f"answer {n}." for n in range(37)}
    assert "data: thinking of 8 answers is not used" in split.notes
    assert "data: attachments of 5 messages are not used" in split.notes
    assert split.dropped.facts == {"image_in_message": 3}
    one = split_records(export(40, thinking=1, attached=1), config(eval_n=4)).notes
    assert "data: thinking of 1 answer is not used" in one
    assert "data: attachments of 1 message are not used" in one
    assert not [note for note in split_records(export(40), config()).notes if "not used" in note][
        1:
    ]


def test_parts_in_parquet_are_those_of_json(tmp_path: Path) -> None:
    records = export(40, thinking=8, images=3)
    pd.DataFrame(records).to_parquet(tmp_path / "a.parquet")
    parts = [split_records(each, config()) for each in (read_path(tmp_path), records)]
    assert parts[0].train == parts[1].train and parts[0].dropped == parts[1].dropped


@pytest.mark.parametrize(
    ("beside", "version"),
    [
        ({}, 3),
        ({"images": 3, "attached": 5}, 3),  # whose rows are as they were
        ({"thinking": 1}, 6),
        ({"thinking": 40}, 6),
        ({"untyped": 1}, 6),
    ],
)
def test_only_sets_with_rows_that_are_read_differently_get_another_key(
    tmp_path: Path, beside: dict[str, int], version: int
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(export(40, **beside)))
    raw = grid.plain("model=tiny_random", "data=file", f"data.path={path}", "data.eval_n=4")
    found = Identifier()(load(raw))
    assert found.data.rendering == version
    plain: Any = json.loads(json.dumps(raw))
    plain["model"]["identity"], plain["data"] = found.model.identity, vars(found.data).copy()
    plain["data"]["columns"] = vars(found.data.columns)
    before = {**plain, "data": {**plain["data"], "rendering": 3}}
    assert (trial_key(plain) == trial_key(before)) == (version == 3)
