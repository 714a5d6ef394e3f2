"""Files that are not data files: each is identified correctly, and the remedy works."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import shlex
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_rows import config
from tests.records import chat, rows_of
from tinyllama_lab.data.sources import read_path
from tinyllama_lab.errors import DamagedError, DataError
from tinyllama_lab.sweep.settings.identify import identified


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_path(path)
    message = str(caught.value)
    assert message.isprintable()
    return message


# ---- encodings -----------------------------------------------------------------------------

TEXTS = {
    "gb18030": "珠穆朗玛峰有多高?,它高八千八百四十八米。",
    "shift_jis": "富士山の高さは?,三千七百七十六メートルです。",
    "euc_jp": "富士山の高さは?,三千七百七十六メートルです。",
    "euc_kr": "한라산의 높이는?,천구백오십 미터입니다.",
    "big5": "玉山有多高?,三千九百五十二公尺。",
    "koi8_r": "Какова высота Эльбруса?,Пять тысяч шестьсот метров.",
    "cp1251": "Какова высота Эльбруса?,Пять тысяч шестьсот метров.",
    "cp866": "Какова высота Эльбруса?,Пять тысяч шестьсот метров.",
    "cp1250": "Gdzie leży Łódź?,W środkowej Polsce: żółć gęślą jaźń.",
    "iso8859_2": "Gdzie leży Łódź?,W środkowej Polsce: żółć gęślą jaźń.",
    "cp1253": "Πόσο ψηλός είναι ο Όλυμπος;,Δύο χιλιάδες μέτρα.",
    "cp1254": "Ağrı Dağı ne kadar yüksek?,Beş bin yüz otuz yedi metre.",
    "mac_roman": "Wie hoch ist die Zugspitze über dem Meer?,Sie ist größer als jeder Hügel.",
    "cp850": "Wie hoch ist die Zugspitze über dem Meer?,Sie ist größer als jeder Hügel.",
    "cp1252": "Wie hoch ist die Zugspitze über dem Meer?,Sie ist größer – als jeder Hügel.",
}


@pytest.mark.skipif(shutil.which("iconv") is None, reason="iconv is not installed")
@pytest.mark.parametrize("encoding", TEXTS)
def test_a_guessed_encoding_is_shown_with_what_it_reads(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"question,answer\n{TEXTS[encoding]}\n".encode(encoding))
    message = refused(path)
    assert "its encoding is perhaps " in message
    guesses = re.findall(r"(?:perhaps|or) (\S+), which reads ('.*?'|\".*?\")", message)
    first = next(n for n, letter in enumerate(TEXTS[encoding]) if not letter.isascii())
    start = TEXTS[encoding][first : first + 15]
    (right,) = [name for name, text in guesses if start in text]
    command, word = re.search(r"type (.*) and set (.*)", message).groups()  # type: ignore[union-attr]
    subprocess.run(["sh", "-c", command.replace(f"-f {guesses[0][0]}", f"-f {right}")], check=True)
    (row,) = read_path(Path(shlex.split(word)[0].partition("=")[2]))
    assert ",".join(row.values()) == TEXTS[encoding]


def test_a_damaged_line_among_utf8_is_not_taken_for_an_encoding(tmp_path: Path) -> None:
    lines = ["question,answer", *["Café,ça"] * 9]
    raw = "\n".join(lines).encode() + b"\nCaf\xe9,x\n"
    (tmp_path / "a.csv").write_bytes(raw)
    message = refused(tmp_path / "a.csv")
    assert "all 11 lines are UTF-8 except line 11; the encoding is perhaps cp1252" in message
    assert "iconv" not in message


@pytest.mark.skipif(shutil.which("iconv") is None, reason="iconv is not installed")
@pytest.mark.parametrize("name", ["a b.csv", "a.csv.gz"])
@pytest.mark.parametrize("codes", [("utf-8", "cp1252"), ("cp1252", "utf-8")])
@pytest.mark.parametrize("count", [1, 6, 20])
def test_two_encodings_are_reported_and_the_command_converts_them(
    tmp_path: Path, name: str, codes: tuple[str, str], count: int
) -> None:
    parts = [
        [f"Où est l’hôtel {n}?" for n in range(count)],
        [f"À côté de la mer {n}" for n in range(6)],
    ]
    first, second = (
        "".join(f"{line}\n" for line in part).encode(code)
        for part, code in zip(parts, codes, strict=True)
    )
    raw = b"question\n" + first + b"plain\n" + second
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    said = ["UTF-8", "another"] if codes[0] == "utf-8" else ["another", "UTF-8"]
    message = refused(path)
    wanted = f"{said[0]} up to line {1 + count} and then {said[1]}"
    if codes[0] == "cp1252" and count == 1:
        wanted = "lines are UTF-8 except line 2; the encoding is perhaps cp1252"
    assert wanted in message
    assert f"(line {2 if codes[0] == 'cp1252' else count + 3})" in message  # the first that is not
    command, word = re.search(r"type (.*) and set (.*)", message).groups()  # type: ignore[union-attr]
    subprocess.run(["sh", "-c", re.sub("-f [^ ]+", "-f CP1252", command)], check=True)
    made = read_path(Path(shlex.split(word)[0].partition("=")[2].strip('"')))
    assert [row["question"] for row in made] == [*parts[0], "plain", *parts[1]]


def test_alternating_encodings_are_reported_with_all_lines(tmp_path: Path) -> None:
    lines = [f"Où est l’hôtel {n}?\n".encode(("utf-8", "cp1252")[n % 2]) for n in range(12)]
    (tmp_path / "a.csv").write_bytes(b"question\n" + b"".join(lines))
    message = refused(tmp_path / "a.csv")
    assert "all 13 lines are UTF-8 except lines 3, 5, 7, 9, 11, 13; the enc" in message
    assert "iconv" not in message
    raw = b"question\n" + lines[1] * 3 + lines[0] + lines[3] * 3
    (tmp_path / "a.csv").write_bytes(raw)
    assert "lines are UTF-8 except lines 2, 3, 4, 6, 7, 8;" in refused(tmp_path / "a.csv")


def test_chinese_in_utf16_without_a_mark_is_detected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        "问题,答案\n珠穆朗玛峰,北京北京\n北京,北京\n".encode("utf-16-le")
    )
    assert "iconv -f UTF-16LE" in refused(tmp_path / "a.csv")


# ---- other kinds of files ------------------------------------------------------------------

OFFICE = b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
KINDS: dict[str, tuple[bytes, str]] = {
    "rows.xlsx": (OFFICE, "in the spreadsheet program, save it as CSV"),
    "rows.xls": (b"\xd0\xcf\x11\xe0", "in the spreadsheet program, save it as CSV"),
    "rows.ods": (b"PK\x03\x04", "in the spreadsheet program, save it as CSV"),
    "rows.docx": (OFFICE, "(a document); save its rows as CSV"),
    "rows.pdf": (b"%PDF-1.7", "(a document); save its rows as CSV"),
    "rows.zip": (b"PK\x03\x04", "type unzip "),
    "rows.tar.gz": (b"", "type tar -xf "),
    "rows.npz": (b"PK\x03\x04", "(arrays); with pandas"),
    "rows.pkl": (pickle.dumps([{"a": 1}]), "may run any code when it is read); with pandas"),
    "pickle.jsonl": (pickle.dumps([{"a": 1}]), "got a pickle"),
    "lfs.jsonl": (LFS, "got a Git LFS pointer instead of the file; type git lfs pull"),
    "lfs.parquet": (LFS, "got a Git LFS pointer"),
    "lfs.arrow": (LFS, "got a Git LFS pointer"),
    "page.jsonl": (b"\n<!DOCTYPE html>\n<html>", "got a web page, such as a login page; download"),
    "page.csv": (b"<html lang='en'><body>", "got a web page"),
    "a.png": (b"\x89PNG\r\n", "only text is trained on"),
    "picture.csv": (b"\x89PNG\r\n", "got an image"),
    "rows": (b'{"a": 1}\n', "where each line is an object, type cp "),
    "lines.txt": (b'{"a": 1}\n', "where each line is an object, type cp "),
    "rows.txt": (b"hello", "(text without columns); if it is a table, type cp "),
    "rows.yaml": (b"a: 1", "write its rows as JSON lines"),
    "empty.csv": (b"", "got an empty file"),
    "header.csv": (b"prompt,response\n", "must hold at least one row, got none"),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_unsupported_file_is_refused_with_its_kind_and_a_remedy(
    tmp_path: Path, name: str
) -> None:
    content, words = KINDS[name]
    (tmp_path / name).write_bytes(content)
    assert words in refused(tmp_path / name)


# tables whose columns begin like the magic bytes of other files, or whose cells hold delimiters
TABLES = {
    **{f"{name}.csv": f"{name},a\nq,r\n" for name in ("ORCID", "ID3", "PAR1", "ARROW1", "RIFF")},
    **{f"{name}.csv": f"{name},a\nq,r\n" for name in ("GIF87", "BZh9", "Rar!", "2024ftyp")},
    "semicolons.csv": "prompt;a\n" + "Hello, x;y\n" * 9,
    "tabs.tsv": "prompt\ta\n" + "x\tYes, y\n" * 9,
    "tabs and semicolons.tsv": "prompt\ta\n" + "x\tYes; y\n" * 9,
    "commas.csv": "prompt,a\n" + "x,y; z\n" * 9,
    "bars.csv": "prompt,a\n" + "x,y | z\n" * 9,
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_begin_like_other_files_are_read(tmp_path: Path, name: str) -> None:
    import pandas as pd

    path = tmp_path / name
    path.write_text(TABLES[name])
    sign = next((c for c in "\t;" if c in TABLES[name].partition("\n")[0]), ",")
    assert read_path(path) == pd.read_csv(path, sep=sign).to_dict("records")


def test_a_file_with_the_wrong_suffix_can_be_copied(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"prompt": ["q"], "response": ["r"]})
    for suffix, write in ((".parquet", frame.to_parquet), (".arrow", frame.to_feather)):
        path = tmp_path / f"table{suffix[1:]}.csv"
        write(path)
        for other in (path.with_suffix(suffix), path.with_suffix(f".new{suffix}")):
            message = refused(path)
            command, word = re.search(r"type (.*) and set (.*)", message).groups()  # type: ignore[union-attr]
            made = Path(shlex.split(word)[0].partition("=")[2])
            assert made == other
            subprocess.run(["sh", "-c", command], check=True)
            assert read_path(made) == [{"prompt": "q", "response": "r"}]


def test_a_database_is_recognised_by_its_bytes(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("create table rows (prompt text)")
    assert "(an SQLite database); save its rows as CSV" in refused(tmp_path / "a.db")


def test_a_folder_without_rows_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.gif"):
        (tmp_path / name).write_bytes(b"x")
    assert "got a folder without (2 .png, 1 .gif); only text is trained on" in refused(tmp_path)


# ---- what `datasets` writes ----------------------------------------------------------------


@pytest.fixture
def made() -> Any:
    datasets = pytest.importorskip("datasets")
    said = 'it\'s "so"\nnew } {line'
    rows = [{"messages": chat(f"q {n}", said)} for n in range(3)]
    return datasets.Dataset.from_list(rows)


def test_chats_come_back_from_every_format_of_datasets(tmp_path: Path, made: Any) -> None:
    wanted = [(f"q {n}", 'it\'s "so"\nnew } {line') for n in range(3)]
    made.to_csv(tmp_path / "a.csv")
    made.to_json(tmp_path / "a.json")
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "disk")
    for name in ("a.csv", "a.json", "a.parquet", "disk"):
        rows, dropped = rows_of(read_path(tmp_path / name))
        assert ([(row.prompt, row.response) for row in rows], dropped) == (wanted, {}), name


def test_a_saved_dictionary_has_its_splits_and_no_cache(tmp_path: Path, made: Any) -> None:
    import datasets

    parts = {"train": made, "test": made.select([0])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    datasets.load_from_disk(tmp_path)["train"].map(lambda row: {"n": 1})
    assert list((tmp_path / "train").glob("cache-*.arrow"))
    records = read_path(tmp_path)
    assert [record["\0split"] for record in records] == ["heldout", *["train"] * 3]


def test_only_the_extra_files_of_datasets_are_skipped(tmp_path: Path) -> None:
    import pandas as pd

    names = ("cached_rows", "tmp_export", "cache-2024", "rows")
    caches = ("cache-0123456789abcdef", "cache-0123456789abcdef_00000_of_00002")
    for name in (*names, *caches):
        pd.DataFrame({"name": [name]}).to_feather(tmp_path / f"{name}.arrow")
    assert {row["name"] for row in read_path(tmp_path)} == {*names}


def test_feather_is_read(tmp_path: Path) -> None:
    import pandas as pd

    pd.DataFrame({"prompt": ["q"], "response": ["r"]}).to_feather(tmp_path / "a.feather")
    assert read_path(tmp_path / "a.feather") == [{"prompt": "q", "response": "r"}]


# ---- lines ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Export;;;\nquestion;answer;n;m\na, b;b;1;2\nc, d;d;2;3\n", 2),
        ("Export of 2024-05-01;;\nquestion;answer;n\na;b;1\nc;d;2\n", 2),
        ("Export\n\nof 2024,\nquestion,answer,n,m\na,b,1,2\nc,d,2,3\nc,d,2,3\n", 4),
        ("Export of 2024\nquestion,answer\na,b\nc,d\n", 2),
        ("Export|||\n|||\nquestion|answer|n|m\na|b|c|d\na|b|c|d\n", 3),
    ],
)
def test_a_title_above_the_header_is_reported_and_can_be_cut_off(
    tmp_path: Path, text: str, line: int
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    message = refused(path)
    assert "line 1 must name the columns, got 'Export" in message
    assert f"if line {line} is the header, type tail -n +{line} " in message
    assert "if line 1 is the header, name every column in it" in message
    command, word = re.search(r"type (.*) and set (.*)", message).groups()  # type: ignore[union-attr]
    subprocess.run(["sh", "-c", command], check=True)
    rows = read_path(Path(shlex.split(word)[0].partition("=")[2]))
    assert [row["answer"] for row in rows][:1] == ["b"]


def test_bars_cut_rows_and_a_markdown_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question|answer\na, b|c; d\ne|f\n")
    assert read_path(path)[0] == {"question": "a, b", "answer": "c; d"}
    path.write_text("| question | answer |\n|---|:--|\n| a | b |\n")
    assert "got a Markdown table; write it as CSV" in refused(path)
    path.write_text(",text\n0,foo\n1,bar\n")  # the index of pandas
    assert read_path(path)[0] == {"column_1": "0", "text": "foo"}


def test_several_bad_lines_are_counted_and_named(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": str(n)}) for n in range(20)]
    for bad in (3, 5, 8, 9, 11, 15, 17):
        lines[bad - 1] = "{'prompt': 1}" if bad % 2 else "[1]"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_path(path)
    not_json, no_object = caught.value.problems
    assert "line 3 must be valid JSON, got '{'prompt': 1}'" in not_json
    assert not_json.endswith("; 6 lines have this problem: 3, 5, 9, 11, 15 and more")
    assert "line 8 must be an object of columns, got an array" in no_object


def test_damaged_lines_and_files_of_a_folder_are_all_reported(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        lines = [json.dumps({"prompt": f"{name} {n}", "response": "r"}) for n in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines + ["{"] * (name != "c")))
    with pytest.raises(DamagedError) as caught:
        read_path(tmp_path)
    assert [re.search(r"(\w)\.jsonl line 6", text)[1] for text in caught.value.problems] == [  # type: ignore[index]
        "a",
        "b",
    ]
    assert caught.value.rows.count({}) == 2 and len(caught.value.rows) == 17
    (tmp_path / "d.csv").write_bytes(b"prompt\n\xff\xe9\n")
    with pytest.raises(DataError) as other:
        read_path(tmp_path)
    assert len(other.value.problems) == 3 and not isinstance(other.value, DamagedError)


def test_other_problems_are_reported_with_the_damaged_lines(tmp_path: Path) -> None:
    names = ("train", "tset", "test")
    rows = [{"prompt": f"q {n}", "response": "r", "split": names[n % 3]} for n in range(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["{", *map(json.dumps, rows), "[1]"]))
    data = config(path=str(path), eval_n=4)
    with pytest.raises(DataError) as caught:
        identified(data, splits={})
    not_json, no_object, split = caught.value.problems
    assert "line 1 must be valid JSON" in not_json and "line 32 must be an object" in no_object
    assert "got 'tset' (10 rows, first: row 3)" in split
    path.write_text("\n".join(map(json.dumps, rows[:2])) + "\n{" * 9)  # most lines are damaged
    with pytest.raises(DataError) as caught:
        identified(data, splits={})
    assert len(caught.value.problems) == 1


@pytest.mark.skipif(shutil.which("iconv") is None, reason="iconv is not installed")
def test_the_message_names_the_first_bad_byte_and_the_line_it_shows(tmp_path: Path) -> None:
    lines = [
        "question,answer",
        "Ist es 5 m²?,Ja",
        "Wie heißt das Gebäude in Köln?,Schönes Gebäude",
    ]
    path = tmp_path / "a.csv"
    raw = "\n".join(lines).encode("cp1252")
    path.write_bytes(raw)
    message = refused(path)
    assert f"got the byte 0xb2 at byte offset {raw.index(0xB2)} (line 2); its" in message
    assert f"which reads line 3 as '{lines[2][:40]}'" in message
    assert re.search(
        r"with the encoding whose reading looks right in place of \S+, type iconv -f", message
    )


@pytest.mark.parametrize(
    "line",
    [
        "[31.12.23, 22:15:03] Ann: hello there",
        "12/31/23, 10:15 PM - Ann: hello there",
        "\u200e[2023-12-31, 22:15:03] Ann: hello there",
    ],
)
def test_a_chat_of_whatsapp_is_recognised(tmp_path: Path, line: str) -> None:
    path = tmp_path / "chat.txt"
    path.write_text(f"{line}\n{line}\n")
    assert "got '.txt' (a chat exported from WhatsApp); write" in refused(path)
    path.write_text("12/31/23 was a good day\n")
    assert "WhatsApp" not in refused(path)
