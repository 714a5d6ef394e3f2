"""Containers, encodings and folders: each is read as pandas and json read it, or refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tinyllama_lab.config.command import typed
from tinyllama_lab.data.formats.cells import SPLIT_KEY
from tinyllama_lab.data.sources import path_digest, read_path
from tinyllama_lab.errors import DataError

FRAME = pd.DataFrame({"question": ["a, b", 'c "d"', "e\nf; g"], "answer": ["x", "NaN", "z\t"]})
ROWS = FRAME.to_dict("records")
WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.csv": lambda path: FRAME.to_csv(path, index=False),
    "semicolons.csv": lambda path: FRAME.to_csv(path, index=False, sep=";"),
    "tabs.csv": lambda path: FRAME.to_csv(path, index=False, sep="\t"),
    "excel.csv": lambda path: FRAME.to_csv(path, index=False, sep=";", encoding="utf-8-sig"),
    "unicode_text.tsv": lambda path: FRAME.to_csv(path, index=False, sep="\t", encoding="utf-16"),
    "utf32.csv": lambda path: FRAME.to_csv(path, index=False, encoding="utf-32"),
    "a.tsv": lambda path: FRAME.to_csv(path, index=False, sep="\t"),
    "commas.tsv": lambda path: FRAME.to_csv(path, index=False),
    "packed.csv.gz": lambda path: FRAME.to_csv(path, index=False),
    "packed.tsv.xz": lambda path: FRAME.to_csv(path, index=False, sep="\t"),
    "a.parquet": lambda path: FRAME.to_parquet(path),
    "lines.jsonl": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "lines.ndjson": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "lines.json": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "packed.jsonl.gz": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "packed.ndjson.bz2": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "packed.json.xz": lambda path: FRAME.to_json(path, orient="records"),
    "array.json": lambda path: FRAME.to_json(path, orient="records"),
    "array.jsonl": lambda path: FRAME.to_json(path, orient="records", indent=2),
    "columns.json": lambda path: FRAME.to_json(path),  # the default of pandas
    "columns.jsonl": lambda path: FRAME.to_json(path),
    "split.json": lambda path: FRAME.to_json(path, orient="split"),
    "index.json": lambda path: FRAME.to_json(path, orient="index"),
    "lists.json": lambda path: path.write_text(json.dumps(FRAME.to_dict("list"))),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": 2, "data": ROWS})),
    "train.json": lambda path: path.write_text(json.dumps({"train": ROWS}, indent=1)),
    "one_after_another.jsonl": lambda path: path.write_text(
        "\n".join(json.dumps(row, indent=2) for row in ROWS)
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_pandas_and_json_write_comes_back(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read_path(tmp_path / name) == ROWS


def test_what_datasets_writes_comes_back(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    made.to_json(tmp_path / "a.json")
    made.to_csv(tmp_path / "a.csv")
    made.to_parquet(tmp_path / "a.parquet")
    assert all(read_path(tmp_path / f"a.{end}") == ROWS for end in ("json", "csv", "parquet"))


def test_the_table_of_pandas_has_its_index_as_a_column(tmp_path: Path) -> None:
    FRAME.to_json(tmp_path / "table.json", orient="table")
    FRAME.to_csv(tmp_path / "index.csv")  # its header begins with a comma
    assert [row["index"] for row in read_path(tmp_path / "table.json")] == ["0", "1", "2"]
    assert [row["column_1"] for row in read_path(tmp_path / "index.csv")] == ["0", "1", "2"]
    FRAME.set_index(FRAME["answer"]).to_parquet(tmp_path / "a.parquet")
    frame = FRAME.set_index(pd.Index(["k", "l", "m"]))
    frame.to_parquet(tmp_path / "b.parquet")
    assert read_path(tmp_path / "b.parquet") == ROWS


def test_two_columns_of_parquet_with_one_name_are_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.Table.from_arrays([arrow.array(["q"]), arrow.array(["r"])], ["a", "a"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="must name each column once, got two called a"):
        read_path(tmp_path / "a.parquet")


def test_one_conversation_is_one_row(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "f"}]}
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps(chat))
        assert read_path(tmp_path / name) == [chat]


def test_the_delimiter_line_of_excel_is_read_and_empty_columns_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sep=|\r\nquestion|answer||\r\na,b|c;d||\r\ne|f||\r\n")
    assert read_path(path) == [
        {"question": "a,b", "answer": "c;d"},
        {"question": "e", "answer": "f"},
    ]


def test_old_line_ends_and_a_row_with_empty_cells_too_many(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"question,answer\ra,b,,\rc,d\r")
    assert read_path(path) == [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "ragged.csv": ("a,b\n1,2\n1,2,3\n4\n", r"line 3 must have 2 fields.* got 3 \(and 1 more such"),
    "ragged.tsv": ("a\tb\n1\t2\n1\t2\t3\n", "field that holds a tab"),
    "object.json": ('{"prompt": {"a": 1}, "n": 3}', "got an object with the keys prompt, n; wrap"),
    "two.json": ('{"good": [{"a": 1}], "bad": [{"a": 1}]}', "with the keys good, bad"),
    "values.json": ("[[1, 2]]", "item 1 must be an object"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}' * 99)[:-9], "cannot be unpacked"),
    "cut.jsonl.xz": (lzma.compress(b'{"a": 1}' * 99)[:-9], "cannot be unpacked"),
    "cut.jsonl.bz2": (bz2.compress(b'{"a": 1}' * 99)[:-9], "cannot be unpacked"),
    "sheet.xlsx": (
        b"PK\x03\x04",
        r"got '.xlsx' \(a spreadsheet .*; in the spreadsheet program",
    ),
    "sheet.csv": (
        b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml",
        "got a spreadsheet or an Office document; in the spreadsheet program",
    ),
    "late.csv": (b"PAR1\x15\x04..PAR1", "got a Parquet file; type cp"),
    "\x1b[2J.jsonl": ("{", r"\\x1b\[2J.jsonl line 1 must be valid JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unreadable_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        read_path(path)
    assert str(caught.value).isprintable()


# ---- commands in refusals ------------------------------------------------------------------


def follow(path: Path, folder: Path) -> Path:
    """Type what the message about a file says, and return the file that it names."""
    with pytest.raises(DataError) as caught:
        read_path(path)
    command, setting = re.search(r"type (.*) and set (.*)", str(caught.value)).groups()  # type: ignore[union-attr]
    subprocess.run(["sh", "-c", command], check=True, cwd=folder)
    (word,) = shlex.split(setting)
    return folder / word.partition("=")[2].strip('"')


@pytest.mark.skipif(shutil.which("iconv") is None, reason="iconv is not installed")
@pytest.mark.parametrize("name", ["a.csv", "it's (1).csv", "-r.csv", "a b.csv"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be"])
def test_the_iconv_line_works_on_that_very_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, encoding: str
) -> None:
    text = "question,answer\nCafé,ça\n"
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(text.encode(encoding))
    made = read_path(follow(Path(name), tmp_path))
    assert made[0] == {"question": "Café", "answer": "ça"}


@pytest.mark.skipif(shutil.which("iconv") is None, reason="iconv is not installed")
def test_the_iconv_line_unpacks_a_packed_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress("question,answer\nCafé,ça\n".encode("cp1252")))
    assert read_path(follow(path, tmp_path)) == [{"question": "Café", "answer": "ça"}]


def test_a_stray_nul_can_be_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nlong enough\0,b\n")
    assert read_path(follow(path, tmp_path)) == [{"question": "long enough", "answer": "b"}]


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
@pytest.mark.parametrize("name", ["a.jsonl", "a b.jsonl.zst"])
def test_the_zstd_line_works(tmp_path: Path, name: str) -> None:
    plain = tmp_path / "plain"
    plain.write_text('{"prompt": "q"}\n')
    subprocess.run(["zstd", "-q", plain, "-o", tmp_path / name], check=True)
    assert read_path(follow(tmp_path / name, tmp_path)) == [{"prompt": "q"}]


@pytest.mark.skipif(shutil.which("iconv") is None, reason="iconv is not installed")
def test_in_a_folder_the_converted_file_takes_the_place_of_the_other(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("q,a\né,b\n".encode("cp1252"))
    with pytest.raises(DataError) as caught:
        read_path(tmp_path)
    subprocess.run(["sh", "-c", str(caught.value).rpartition("type ")[2]], check=True)
    assert read_path(tmp_path) == [{"q": "é", "a": "b"}]


@pytest.mark.parametrize("text", ["plain", "a b", "b,c", 'say "hi"', "null", "1", "naïve", "a=b"])
def test_a_suggested_setting_means_exactly_this_column(text: str) -> None:
    parser = pytest.importorskip("hydra.core.override_parser.overrides_parser")
    (word,) = shlex.split(typed("data.columns.prompt", text))
    assert parser.OverridesParser.create().parse_override(word).value() == text


# ---- folders -------------------------------------------------------------------------------


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prompt": name}) + "\n")
    return folder


def test_all_files_of_a_folder_are_read_and_nothing_hidden(tmp_path: Path) -> None:
    fill(tmp_path, "b.jsonl", "a/c.jsonl", ".git/x.jsonl", ".hidden.jsonl")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "d.csv").write_text("prompt\nd\n")
    names = sorted(row["prompt"] for row in read_path(tmp_path))
    assert names == ["a/c.jsonl", "b.jsonl", "d"]
    assert all(SPLIT_KEY not in row for row in read_path(tmp_path))


@pytest.mark.parametrize(
    ("train", "heldout"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl"),
        ("my_training_rows.jsonl", "my_dev_rows.jsonl"),
        ("train/0.jsonl", "valid/0.jsonl"),
        ("data/train1.jsonl", "data/eval1.jsonl"),
    ],
)
def test_file_names_say_the_split_as_in_datasets(tmp_path: Path, train: str, heldout: str) -> None:
    found = {row["prompt"]: row[SPLIT_KEY] for row in read_path(fill(tmp_path, train, heldout))}
    assert found == {train: "train", heldout: "heldout"}
    datasets = pytest.importorskip("datasets.data_files")
    patterns = datasets.get_data_patterns(str(tmp_path))  # what the library would take them for
    assert len(patterns) == 2 and "train" in patterns


def test_a_file_that_says_no_split_among_those_that_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got test.jsonl and extra.jsonl; rename the second"):
        read_path(fill(tmp_path, "test.jsonl", "extra.jsonl"))


def test_the_digest_of_a_folder_counts_every_file_by_name_and_content(tmp_path: Path) -> None:
    one, two = fill(tmp_path / "one", "a.jsonl", "b/c.jsonl"), tmp_path / "two"
    shutil.copytree(one, two)
    first = path_digest(one)
    assert path_digest(two) == first and len(first) == 16
    (two / "README.md").write_text("no data")
    assert path_digest(two) == first
    (two / "b" / "c.jsonl").rename(two / "b" / "d.jsonl")
    renamed = path_digest(two)
    (two / "a.jsonl").write_text('{"prompt": "other"}')
    assert len({first, renamed, path_digest(two)}) == 3


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    fill(tmp_path / "real", "a.jsonl")
    inside = fill(tmp_path / "set", "b.jsonl")
    (inside / "more").symlink_to(tmp_path / "real")
    (inside / "loop").symlink_to(inside)
    assert sorted(row["prompt"] for row in read_path(inside)) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("kind", ["broken link", "link to itself", "pipe"])
def test_an_unreadable_data_file_is_not_skipped(tmp_path: Path, kind: str) -> None:
    path = fill(tmp_path, "a.jsonl") / "b.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "link to itself" else tmp_path / "nothing")
    for read in (read_path, path_digest):
        with pytest.raises(DataError, match=r"b\.jsonl must be a") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["a.jsonl", "inner"])
def test_without_permission_the_file_is_named(tmp_path: Path, name: str) -> None:
    place = fill(tmp_path, "a.jsonl", "inner/b.jsonl") / name
    place.chmod(0)
    try:
        with pytest.raises(DataError, match=f"{name}.*Permission denied; correct data.path"):
            read_path(tmp_path)
    finally:
        place.chmod(0o700)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.csv", "No such file or directory; correct data.eval_path"),
        ("https://example.org/a.jsonl", "download it first, or take a set of the hub: data=hub"),
        ("", "must hold data files"),  # this folder
    ],
)
def test_a_path_that_leads_nowhere_names_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (read_path, path_digest):
        with pytest.raises(DataError, match=message):
            read(Path(path), "data.eval_path")


def test_a_large_cell_is_read_whole(tmp_path: Path) -> None:
    text = "word, " * 200_000
    frame = pd.DataFrame({"question": [text], "answer": ["x"]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert read_path(tmp_path / "a.csv")[0]["question"] == text
