"""Files with single lines that are not UTF-8: which lines, their encoding, and the remedy."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.data.test_rows import config
from tinyllama_lab.data.reading.encodings import misplaced_share
from tinyllama_lab.data.sources import read_path
from tinyllama_lab.errors import DataError
from tinyllama_lab.sweep.settings.identify import identified

SAID = [
    "Wo ist die nächste Bäckerei?",
    "Où est l'hôtel près d'ici?",
    "¿Dónde está la estación?",
    "Smörgås på Åland",
    "São João não",
    "Straße über Größe",
]


def lines_of(count: int, bad: set[int], encoding: str, split: str = "train") -> list[bytes]:
    """Return lines of JSON, numbered from 1; those of `bad` are in another encoding."""
    rows = [
        {"prompt": f"{SAID[n % len(SAID)]} {n}", "response": f"r {n}", "split": split}
        for n in range(1, count + 1)
    ]
    return [
        json.dumps(row, ensure_ascii=False).encode(encoding if n in bad else "utf-8")
        for n, row in enumerate(rows, 1)
    ]


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_path(path)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("encoding", ["cp1252", "cp850", "mac_roman"])
@pytest.mark.parametrize("name", ["a.jsonl", "it's (1).jsonl"])
def test_the_command_converts_the_other_lines_alone(
    tmp_path: Path, name: str, encoding: str
) -> None:
    bad = {2, 5, 27, 34, 51, 70}
    lines = lines_of(72, bad, encoding)
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    message = refused(path)
    assert "all 72 lines are UTF-8 except lines 2, 5, 27, 34, 51, 70; " in message
    first = lines[1].decode(encoding)
    read = re.search(rf"the encoding is perhaps {encoding}, which reads '(.*?)'", message)
    assert read and read[1].strip("'\"") in first
    command, word = re.search(r"type (.*) and set (.*)", message).groups()  # type: ignore[union-attr]
    subprocess.run(["sh", "-c", command], check=True)
    made = Path(shlex.split(word)[0].partition("=")[2].strip('"'))
    right = [
        line.decode(encoding if n in bad else "utf-8").encode() for n, line in enumerate(lines, 1)
    ]
    assert made.read_bytes() == b"\xef\xbb\xbf" + b"\r\n".join(right)
    assert len(read_path(made)) == 72


@pytest.mark.parametrize("said", SAID)
def test_western_letters_are_first_read_as_cp1252(tmp_path: Path, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("prompt\né\né\n".encode() + said.encode("cp1252") + b"\n")
    assert f"perhaps cp1252, which reads '{said}'" in refused(path).replace('"', "'")


def test_a_plausible_reading_has_its_letters_where_they_belong() -> None:
    for said in SAID:
        assert misplaced_share(said) == 0
        assert misplaced_share(said.encode("utf-8").decode("latin-1")) > 0.3
    assert misplaced_share("don’t – „so“ 5 °C") == 0
    for wrong in ("cafÚ", "m³ller", "g\u251cr", "x\ufffd", "caf\u0439"):
        assert misplaced_share(f"the {wrong} is") == 1


def test_a_line_with_letters_in_utf8_as_well_is_damaged_and_not_converted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt\n" + "Où est né\n".encode() * 3 + b"O\xc3\xb9 est n\xc3\n")
    message = refused(path)
    assert message.endswith("except line 5; correct or remove line 5")


def test_more_lines_than_twenty_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines_of(90, set(range(2, 60, 2)), "cp1252")))
    assert "36, 38, 40 and 9 more" in refused(path)


@pytest.mark.parametrize("is_held_out", [True, False])
def test_all_damage_is_reported_at_once(tmp_path: Path, is_held_out: bool) -> None:
    lines = lines_of(60, {3, 9}, "cp1252")
    lines[20:30] = lines_of(10, set(), "cp1252", "tset")
    lines[30:40] = lines_of(10, set(), "cp1252", "trian")
    lines[50] = lines[50][:30]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    own = tmp_path / "val.jsonl"
    own.write_bytes(b"\n".join(lines_of(9, {2}, "cp1252")))
    asked = config(path=str(path), eval_n=4)
    if is_held_out:
        asked = config(path=str(path), eval_n=4, eval_path=str(own))
    with pytest.raises(DataError) as caught:
        identified(asked, splits={})
    said = ["except lines 3, 9;", "line 51 must be valid JSON"]
    said.append("except line 2;" if is_held_out else "got 'tset' (10 rows, first: row 21), 'tri")
    problems = caught.value.problems
    assert len(problems) == 3
    assert all(words in text for words, text in zip(said, problems, strict=True))


def test_rows_of_a_file_in_another_encoding_are_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines_of(40, set(range(1, 41)), "cp1252", "tset")))
    with pytest.raises(DataError) as caught:
        identified(config(path=str(path), eval_n=4), splits={})
    assert len(caught.value.problems) == 1
