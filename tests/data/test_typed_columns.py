"""Columns beside those that are typed, and what the driver makes of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import grid
from tests.data.test_rows import config
from tests.records import Records, chat, columns, written
from tinyllama_lab.config.resolve import resolved
from tinyllama_lab.config.schema import load
from tinyllama_lab.data.formats.cells import SPLIT_KEY
from tinyllama_lab.data.formats.detection import recognise
from tinyllama_lab.data.rows import to_rows
from tinyllama_lab.data.sources import read_path
from tinyllama_lab.data.splits.splits import split_records
from tinyllama_lab.errors import DataError
from tinyllama_lab.study.trial import trial_key
from tinyllama_lab.sweep.plan import check_cells
from tinyllama_lab.sweep.settings.identify import Identifier, rendering


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
        "data: recognised the split in 'split', besides the columns that are set; not used: "
        "db_id, create_table; if 'create_table' belongs in the prompt, add "
        "data.columns.context=create_table"
    )
    off = split_records(records, config(columns={**TYPED, "split": ""}, eval_n=4))
    assert len(off.train) + len(off.heldout) == 40 and off.notes[0].startswith("data: not used: ")


def test_the_other_column_of_a_typed_pair_is_described_as_recognised() -> None:
    records = [{"ask": f"q {n}", "response": "r", "context": "c"} for n in range(3)]
    _, note = recognise(records, config(columns={"prompt": "ask"}))
    assert note == (
        "data: recognised contexts in 'context' and responses in 'response', besides the columns "
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
