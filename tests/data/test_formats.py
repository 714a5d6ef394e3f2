"""Column recognition on data as users bring it: names, missing values, typed settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests import grid
from tests.data.test_rows import config
from tests.data.test_splits import ALPACA
from tinyllama_lab.config.schema import load, resolved
from tinyllama_lab.data.formats import cells
from tinyllama_lab.data.formats.cells import SPLIT_KEY, as_text, is_missing, parsed_cell
from tinyllama_lab.data.formats.detection import recognise
from tinyllama_lab.data.rows import RawRow, to_rows
from tinyllama_lab.data.sources import read_path
from tinyllama_lab.data.splits.splits import split_records
from tinyllama_lab.errors import DataError
from tinyllama_lab.study.trial import trial_key
from tinyllama_lab.sweep.plan import check_cells
from tinyllama_lab.sweep.settings.identify import Identifier, rendering

Records = list[dict[str, Any]]


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def columns(records: Records, **changes: Any) -> dict[str, str]:
    """Return the resolved columns of a data set, without those that it does not have."""
    data, _ = recognise(records, config(**changes))
    return {key: name for key, name in vars(data.columns).items() if name}


def rows_of(records: Records, **changes: Any) -> tuple[list[RawRow], dict[str, int]]:
    rows, dropped = to_rows(records, config(**changes))
    return rows, dropped.facts


def written(folder: Path, records: Records, end: str = "jsonl") -> Path:
    path = folder / f"rows.{end}"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- columns -------------------------------------------------------------------------------

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


def turns_apart(**columns: Any) -> Records:
    """Return forty rows; a function per additional column makes its cells from the row number."""
    return [
        {"prompt": f"q {n}", "response": f"r {n}"} | {k: make(n) for k, make in columns.items()}
        for n in range(40)
    ]


def test_rows_of_one_conversation_stay_on_one_side() -> None:
    records = turns_apart(Conversation_ID=lambda n: n // 4, id=lambda n: n)
    data, line = recognise(records, config())
    assert data.columns.group == "Conversation_ID"
    assert line == (
        "data: recognised prompts and responses in the columns 'prompt' and 'response'; rows with "
        "the same 'Conversation_ID' stay on one side of the split; not used: id"
    )
    found = split_records(records, config(eval_n=4))
    held, train = ({int(r.group) for r in rows} for rows in (found.heldout, found.train))
    assert held and train and not held & train


@pytest.mark.parametrize(
    ("changes", "cells", "group"),
    [
        ({}, {"session_id": lambda n: n // 10}, "session_id"),  # a quarter of the rows each
        ({}, {"session_id": lambda n: n // 11}, None),
        ({}, {"session_id": lambda n: n}, None),  # each row is one of its own
        ({}, {"session_id": lambda n: "all"}, None),
        ({}, {"session_id": lambda n: [n // 4]}, None),
        ({}, {"conv_id": lambda n: n // 2, "session_id": lambda n: n // 8}, "session_id"),
        ({"columns": {"group": ""}}, {"conv_id": lambda n: n // 2}, None),
        ({"columns": {"group": "who"}}, {"conv_id": lambda n: n // 2, "who": str}, "who"),
        ({"eval_path": "other.jsonl"}, {"conv_id": lambda n: n // 2}, None),
        ({}, {"conv_id": lambda n: n // 2, "split": lambda n: ("train", "val")[n % 2]}, None),
        ({}, {"conv_id": lambda n: n // 2, SPLIT_KEY: lambda n: ("train", "val")[n % 2]}, None),
        ({}, {"conv_id": lambda n: n // 2, "split": lambda _: "train"}, "conv_id"),
        (
            {"columns": {"split": ""}},
            {"conv_id": lambda n: n // 2, "split": lambda n: ("train", "val")[n % 2]},
            "conv_id",
        ),
    ],
)
def test_a_group_is_recognised_where_it_can_be_one(
    changes: dict[str, Any], cells: dict[str, Any], group: str | None
) -> None:
    assert columns(turns_apart(**cells), **changes).get("group") == group


SQL = "SELECT name FROM towns"
SCHEMA = "CREATE TABLE towns (name TEXT, population INTEGER)"


def questions(count: int = 40, **beside: Callable[[int], Any]) -> Records:
    """Return questions about tables with their queries, and the columns `beside`."""
    return [
        {"db_id": f"db{n % 5}", "question": f"q {n}?", "create_table": f"{SCHEMA} -- {n}"}
        | {"sql": f"{SQL} LIMIT {n}"}
        | {name: make(n) for name, make in beside.items()}
        for n in range(count)
    ]


TYPED = {"prompt": "question", "response": "sql"}


def test_a_split_is_used_where_a_refusal_was_followed_literally() -> None:
    records = questions(split=lambda n: ("train", "dev", "test")[n % 3])
    with pytest.raises(DataError) as caught:
        recognise(records, config())
    assert str(caught.value).endswith(
        "for example, type data.columns.prompt=question data.columns.response=sql"
    )
    split = split_records(records, config(columns=TYPED, eval_n=4))
    assert {row.number for row in split.train} == {n + 1 for n in range(40) if n % 3 == 0}
    assert split.notes[0] == (
        "data: recognised the split in 'split', beside the columns that are set; not used: "
        "db_id, create_table; if 'create_table' belongs in the prompt, add "
        "data.columns.context=create_table"
    )
    off = split_records(records, config(columns={**TYPED, "split": ""}, eval_n=4))
    assert len(off.train) + len(off.heldout) == 40 and off.notes[0].startswith("data: not used: ")


def test_the_other_column_of_a_typed_pair_is_described_as_recognised() -> None:
    records = [{"ask": f"q {n}", "response": "r", "context": "c"} for n in range(3)]
    _, note = recognise(records, config(columns={"prompt": "ask"}))
    assert note == (
        "data: recognised contexts in 'context' and responses in 'response', beside the columns "
        "that are set"
    )


@pytest.mark.parametrize(
    ("text", "beside"),
    [
        ({"messages": "m"}, {"split": "subset", "system": "system", "tools": "tools"}),
        ({"prompt": "p", "response": "r"}, {"split": "subset", "system": "system"}),
        ({"text": "p"}, {"split": "subset"}),
        ({"messages": "m", "split": "none"}, {"split": "none", "group": "chat_id"}),
    ],
)
def test_extra_columns_are_detected_beside_typed_columns(
    text: dict[str, str], beside: dict[str, str]
) -> None:
    record = {"m": chat("q", "a b"), "p": "q", "r": "a b", "system": "s", "tools": [{"name": "f"}]}
    records = [
        {**record, "subset": ("train", "test")[n % 2], "chat_id": n // 4, "none": None}
        for n in range(40)
    ]
    data, note = recognise(
        records, config(columns=text, style="text" if "text" in text else "chat")
    )
    found = {key: name for key, name in vars(data.columns).items() if name}
    assert {**text, **beside}.items() <= found.items()
    assert all(f"'{name}'" in note for key, name in beside.items() if key not in text)
    settled = config(columns=text, style=data.style, rendering=3)
    assert recognise(records, settled)[0] == settled  # what a trial says is not asked again


def test_a_typed_split_settles_which_of_two_columns_it_is() -> None:
    records = questions(split=lambda n: ("train", "test")[n % 2], fold=lambda _: "train")
    with pytest.raises(DataError, match=r"'split' and 'fold' could be it"):
        recognise(records, config(columns=TYPED))
    assert columns(records, columns={**TYPED, "split": "split"})["split"] == "split"


def test_held_out_rows_of_their_own_have_the_columns_of_the_others() -> None:
    records, held_out = questions(), questions(8, system=lambda n: "s")
    data = config(columns=TYPED, eval_path="other.jsonl", eval_n=4)
    split = split_records(records, data, held_out)
    assert {row.system for row in (*split.train, *split.heldout)} == {""}


@pytest.mark.parametrize(
    ("cells", "changes", "is_suggested"),
    [
        (lambda n: f"{SCHEMA} -- {n}", {}, True),
        (lambda n: f"{SCHEMA} -- {n % 3}", {}, True),  # several questions about one table
        (lambda n: SCHEMA, {}, False),  # every row has it
        (lambda n: f"about {n}", {}, False),
        (lambda n: f"### Question: q {n}?\n### The query is\n{SQL} LIMIT {n}", {}, False),
        (lambda n: f"{SCHEMA} -- {n}", {"columns": {**TYPED, "context": ""}}, False),
        (lambda n: f"{SCHEMA} -- {n}", {"style": "instruction_response"}, True),
    ],
)
def test_a_long_text_that_differs_is_suggested_as_context(
    cells: Callable[[int], str], changes: dict[str, Any], is_suggested: bool
) -> None:
    records = [{**row, "create_table": cells(n)} for n, row in enumerate(questions())]
    _, note = recognise(records, config(**{"columns": TYPED, **changes}))
    assert note.startswith("data: not used: db_id, create_table")
    assert ("data.columns.context=create_table" in note) == is_suggested


def test_recognised_pairs_get_the_same_suggestion() -> None:
    records = [{"question": f"q {n}", "answer": "r", "schema": f"{SCHEMA} {n}"} for n in range(9)]
    _, note = recognise(records, config())
    assert note.endswith("if 'schema' belongs in the prompt, add data.columns.context=schema")
    alpaca = {"instruction": "q", "input": SCHEMA, "output": "r"}
    assert recognise([alpaca], config("alpaca"))[1] == ""


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


# ---- missing values ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, float("nan"), np.float32("nan"), float("inf"), pd.NaT, pd.NA, np.datetime64("NaT")],
)
def test_a_missing_value_is_no_text_anywhere(value: Any) -> None:
    assert is_missing(value) and as_text(value) == ""
    record = {"prompt": "q", "context": value, "response": "r", "system": value, "s": value}
    data = {"columns": {"split": "s", "intent": "s", "group": "s"}}
    (row,), _ = rows_of([record, {"prompt": "q"}], **data)[0], None
    assert (row.context, row.system, row.split, row.intent, row.group) == ("",) * 5
    assert rows_of([{**record, "response": value}, record])[1] == {"empty_response": 1}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": value}]
    assert rows_of([{"messages": turns}])[1] == {"empty_response": 1}


@pytest.mark.parametrize("text", ["NaN", "nan", "None", "null", "NA", "N/A", "<NA>", "Infinity"])
def test_the_text_of_a_missing_value_stays_text(tmp_path: Path, text: str) -> None:
    frame = pd.DataFrame({"prompt": ["q", "q"], "response": [text, "r"]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.json", orient="records")
    for name in ("a.csv", "a.parquet", "a.json"):
        rows, dropped = rows_of(read_path(tmp_path / name))
        assert ([row.response for row in rows], dropped) == ([text, "r"], {})


GAPS = pd.DataFrame(
    {"prompt": ["a", "b", "c"], "response": ["x", None, np.nan], "context": [np.nan, "k", None]}
)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.csv", lambda path: GAPS.to_csv(path, index=False)),
        ("a.tsv", lambda path: GAPS.to_csv(path, index=False, sep="\t")),
        ("a.json", lambda path: GAPS.to_json(path)),
        ("a.jsonl", lambda path: GAPS.to_json(path, orient="records", lines=True)),
        ("a.parquet", lambda path: GAPS.to_parquet(path)),
        # what json writes of the same, with a bare NaN
        (
            "b.jsonl",
            lambda path: path.write_text("\n".join(map(json.dumps, GAPS.T.to_dict().values()))),
        ),
    ],
)
def test_missing_values_of_every_file_format_are_missing(
    tmp_path: Path, name: str, write: Callable[[Path], Any]
) -> None:
    write(tmp_path / name)
    rows, dropped = rows_of(read_path(tmp_path / name))
    assert [(row.prompt, row.context, row.response) for row in rows] == [("a", "", "x")]
    assert dropped == {"empty_response": 2}


def test_bare_constants_of_json_are_missing_and_numbers_stay_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": 1.50, "response": NaN}\n{"prompt": 1e400, "response": -Infinity}\n'
        '{"prompt": "q", "response": Infinity}\n{"prompt": 1e400, "response": 1.50}\n'
        '{"prompt": true, "response": -0}\n{"prompt": "q"}\n'
    )
    rows, dropped = rows_of(read_path(path))
    assert [(row.prompt, row.response) for row in rows] == [("1e400", "1.50"), ("true", "-0")]
    assert dropped == {"empty_response": 4}


def test_only_what_looks_like_an_array_is_read_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    array = "[{'a': 1}\n {'a': 2}]"
    assert parsed_cell(array) == [{"a": 1}, {"a": 2}]
    monkeypatch.setattr(cells, "_parse_array", lambda text: pytest.fail("it takes long"))
    for text in ("[INST] q [/INST]", "{\n f(x)\n}", "[{ is said", "[x] }\n{"):
        assert parsed_cell(text) == text


def test_numbers_of_parquet_become_what_people_write(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    days = pd.to_datetime(["2024-01-31 10:30", None, "2024-02-01"], format="mixed")
    table = {
        "gaps": arrow.array([3.0, None, 1e15]),  # integers with a gap, as pandas has them
        "float": arrow.array([3.0, 2.5, 1e-7]),
        "mixed": arrow.array([3.0, None, 2.5]),
        "single": arrow.array([0.1, 2.5, 3.0], arrow.float32()),
        "whole": arrow.array([1, None, 2**60]),
        "flag": arrow.array([True, None, False]),
        "time": arrow.array(days),
        "day": arrow.array(days).cast(arrow.date32(), safe=False),
        "price": arrow.array([12.5, None, 0]).cast(arrow.decimal128(12, 2)),
        "bytes": arrow.array(["é".encode(), None, b"\xff"]),
        "word": arrow.array(["a", None, "NaN"]).dictionary_encode(),
    }
    parquet.write_table(arrow.table(table), tmp_path / "a.parquet")
    records = read_path(tmp_path / "a.parquet")
    cells = {name: [record[name] for record in records] for name in table}
    assert cells.pop("bytes") == ["é", None, b"\xff"]
    assert {name: [as_text(cell) for cell in column] for name, column in cells.items()} == {
        "gaps": ["3", "", "1000000000000000"],
        "float": ["3.0", "2.5", "1e-07"],
        "mixed": ["3.0", "", "2.5"],
        "single": ["0.1", "2.5", "3.0"],
        "whole": ["1", "", str(2**60)],
        "flag": ["true", "", "false"],
        "time": ["2024-01-31 10:30:00", "", "2024-02-01 00:00:00"],
        "day": ["2024-01-31", "", "2024-02-01"],
        "price": ["12.50", "", "0.00"],
        "word": ["a", "", "NaN"],
    }


# ---- the driver and the worker -------------------------------------------------------------


def many(count: int = 40) -> Records:
    return [
        {"id": n, "instruction": f"q {n}", "input": "c" * (n % 2), "output": f"r {n}"}
        for n in range(count)
    ]


def plain_command(path: Path, *more: str) -> list[str]:
    sizes = ("data.n=8", "data.eval_n=4")
    return ["model=tiny_random", "data=file", f"data.path={path}", *sizes, *more]


def keys_and_notes(path: Path, *more: str) -> tuple[str, list[str]]:
    find = Identifier()
    found = find(load(grid.plain(*plain_command(path, *more))))
    assert find.problems == []
    return trial_key(resolved(found)), find.notes


def test_typed_and_recognised_columns_are_one_trial(tmp_path: Path) -> None:
    path = written(tmp_path, many())
    key, notes = keys_and_notes(path)
    assert notes == [
        "data: recognised Alpaca rows in the columns 'instruction', 'input' and 'output'; "
        "not used: id"
    ]
    typed = [
        f"data.columns.{k}={name}"
        for k, name in (("prompt", "instruction"), ("context", "input"), ("response", "output"))
    ]
    assert keys_and_notes(path, *typed) == (key, ["data: not used: id"])
    assert keys_and_notes(path, typed[1])[0] == key
    assert keys_and_notes(path, "data.columns.context=''")[0] != key


def test_a_trial_keeps_to_the_columns_that_the_driver_found(tmp_path: Path) -> None:
    records = [{**row, "split": ("train", "test")[n % 5 == 0]} for n, row in enumerate(many())]
    path = written(tmp_path, records)
    typed = ("data.columns.prompt=instruction", "data.columns.response=output")
    off = "data.columns.split=''"
    found = [
        Identifier()(load(grid.plain(*plain_command(path, *typed, *more))))
        for more in ((), (off,))
    ]
    trained = []
    for each in found:
        settled = config(**{k: v for k, v in resolved(each)["data"].items()})
        trained.append({row.number for row in split_records(records, settled).train})
    held_out = {n for n in range(1, 41) if (n - 1) % 5 == 0}
    assert not trained[0] & held_out and trained[1] & held_out
    assert len({trial_key(resolved(each)) for each in found}) == 2


def test_sets_of_the_hub_keep_the_columns_that_are_switched_off() -> None:
    def hub_set(*settings: str) -> dict[str, Any]:
        raw = grid.plain("model=tiny_random", *settings)
        built = load(raw)
        data = replace(built.data, rendering=rendering(built))
        return dict(resolved(replace(built, data=data))["data"])

    typed = ("data.columns.prompt=question", "data.columns.response=sql")
    mine = ("data=hub", "data.repo=me/mine", *typed)
    records = questions(split=lambda n: ("train", "test")[n % 2])
    for more, split in (((), "split"), (("data.columns.split=''",), "")):
        found, _ = recognise(records, config(**hub_set(*mine, *more)))
        assert found.columns.split == split
    shipped = hub_set("data=indicvault")  # their trials keep their keys
    assert (shipped["rendering"], shipped["columns"]["split"]) == (3, None)


def test_a_grid_reports_once_what_it_recognised(tmp_path: Path) -> None:
    notes: list[str] = []
    cells = grid.cells(*plain_command(written(tmp_path, many()), "lora.r=2,4", "data.n=4,8"))
    configs = check_cells(cells, notes)
    assert len(configs) == 4 and len(notes) == 1
    assert {each.data.columns.prompt for each in configs} == {"instruction"}


def test_text_and_folders_reach_the_configuration(tmp_path: Path) -> None:
    texts = [{"text": f"words {n}"} for n in range(40)]
    found = Identifier()(load(grid.plain(*plain_command(written(tmp_path, texts)))))
    assert (found.data.style, found.data.columns.text) == ("text", "text")


def test_cut_chats_are_noted_with_the_first(tmp_path: Path) -> None:
    records = [{"messages": chat(f"q {n}", "r")} for n in range(40)]
    records[11] = {"messages": chat("q 11", "r", "thanks")}
    _, notes = keys_and_notes(written(tmp_path, records))
    assert notes[1] == "data: 1 of 40 chats are used up to their last answer (first: row 12)"


def test_files_of_a_folder_decide_what_is_held_out(tmp_path: Path) -> None:
    from tinyllama_lab.data.splits.splits import split_rows

    rows = many()
    written(tmp_path, rows[:30]).rename(tmp_path / "train.jsonl")
    written(tmp_path, rows[30:]).rename(tmp_path / "validation.jsonl")
    made, _ = to_rows(read_path(tmp_path), config())
    split = split_rows(made, config())
    assert {row.prompt for row in split.heldout} == {f"q {n}" for n in range(30, 40)}
    assert {row.prompt for row in split.train} == {f"q {n}" for n in range(30)}


def test_a_set_of_the_hub_is_read_as_a_file_is(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from tinyllama_lab.core.dataset.records import hub_records

    data = config(source="hub", repo="owner/name")
    GAPS.to_parquet(tmp_path / "train.parquet")
    rows, left_out = to_rows(hub_records(data, tmp_path), data)
    dropped = left_out.facts
    assert [(row.prompt, row.context, row.response) for row in rows] == [("a", "", "x")]
    assert dropped == {"empty_response": 2}


@pytest.mark.skipif(not ALPACA.is_file(), reason=f"{ALPACA} is not on this machine")
def test_alpaca_needs_no_column() -> None:
    records = read_path(ALPACA)
    assert columns(records) == {"prompt": "instruction", "context": "input", "response": "output"}
    lines = [json.loads(line) for line in ALPACA.read_text().splitlines()]
    rows, dropped = to_rows(records, config())
    wanted = [(r["instruction"], r["output"]) for r in lines if r["output"].strip()]
    assert [(row.prompt, row.response) for row in rows] == wanted
    assert len(rows) + dropped.counts.total() == len(lines)
