"""Missing values and numbers of every file format, as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.data.test_rows import config
from tests.records import rows_of
from tinyllama_lab.data.formats import cells
from tinyllama_lab.data.formats.cells import as_text, is_missing, parsed_cell
from tinyllama_lab.data.rows import to_rows
from tinyllama_lab.data.sources import read_path


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


def test_a_set_of_the_hub_is_read_as_a_file_is(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from tinyllama_lab.core.dataset.records import hub_records

    data = config(source="hub", repo="owner/name")
    GAPS.to_parquet(tmp_path / "train.parquet")
    rows, left_out = to_rows(hub_records(data, tmp_path), data)
    dropped = left_out.facts
    assert [(row.prompt, row.context, row.response) for row in rows] == [("a", "", "x")]
    assert dropped == {"empty_response": 2}
