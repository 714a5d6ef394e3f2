"""The event file: complete records are read back; cut or damaged ones are not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama_lab.study.events import EventLog, EventReader, read_events

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
names = st.text(min_size=1, max_size=8).filter(lambda n: n not in ("self", "kind", "time", "crc"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "events.jsonl"


def write(path: Path, count: int, first: int = 0) -> None:
    log = EventLog(path)
    for step in range(first, first + count):
        log.append("metric", step=step)


def steps(path: Path) -> list[int]:
    return [event["step"] for event in read_events(path)]


@given(records=st.lists(st.dictionaries(names, values, max_size=3), max_size=5))
def test_written_events_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    log = EventLog(path)
    for record in records:
        log.append("x", **record)
    read = [{k: v for k, v in e.items() if k not in ("kind", "time")} for e in read_events(path)]
    assert json.dumps(read) == json.dumps(records)  # NaN equals itself here


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "\u2028\u2029\x85", "\0", "नेपाल 🏔", '"\\'])
def test_a_text_with_line_ends_stays_one_event(path: Path, text: str) -> None:
    EventLog(path).append("note", text=text)
    (event,) = read_events(path)
    assert event["text"] == text and path.read_bytes().count(b"\n") == 1


def test_there_are_no_events_where_there_is_no_file(path: Path) -> None:
    assert read_events(path) == []


def test_a_line_cut_off_at_any_byte_is_not_read(path: Path) -> None:
    write(path, 2)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert len(read_events(path)) == (1 if cut >= first else 0)


def test_a_cut_line_is_gone_before_anything_is_appended(path: Path) -> None:
    write(path, 2)
    path.write_bytes(path.read_bytes()[:-7])
    write(path, 2, first=5)
    reader = EventReader(path)
    assert [event["step"] for event in reader.poll()] == [0, 5, 6]
    assert reader.damaged == 0


def test_no_bit_of_an_event_can_change_unseen(path: Path) -> None:
    write(path, 3)
    good, whole, dice = read_events(path), path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        assert all(event in good for event in read_events(path))


NO_EVENTS = [b"{}", b"[]", b"[1, 2]", b"3", b"null", b'"x"', b"\xff\xfe", b"{", b"", b"[" * 99_999]


@pytest.mark.parametrize("line", NO_EVENTS, ids=lambda line: repr(line[:8]))
def test_a_line_that_is_no_event_is_skipped_and_counted(path: Path, line: bytes) -> None:
    write(path, 1)
    path.write_bytes(path.read_bytes() + line + b"\n")
    write(path, 1, first=1)
    reader = EventReader(path)
    assert [event["step"] for event in reader.poll()] == [0, 1]
    assert reader.damaged == 1


def test_a_reader_sees_every_event_once_while_the_file_grows(path: Path) -> None:
    reader, seen = EventReader(path), []
    assert reader.poll() == []
    for step in range(5):
        write(path, 1, first=step)
        with path.open("ab") as file:  # a line that is still being written
            file.write(b'{"kind": "met')
        seen += [event["step"] for event in reader.poll()]
    assert seen == [0, 1, 2, 3, 4] and reader.poll() == []


def test_a_reader_goes_on_from_a_kept_offset(path: Path) -> None:
    write(path, 3)
    first = EventReader(path)
    first.poll()
    write(path, 2, first=3)
    second = EventReader(path, first.offset)
    assert [event["step"] for event in second.poll()] == [3, 4]
    assert second.offset == path.stat().st_size


def test_a_reader_starts_over_if_the_file_was_replaced(path: Path) -> None:
    write(path, 5)
    reader = EventReader(path)
    reader.poll()
    path.unlink()
    write(path, 1, first=9)
    assert [event["step"] for event in reader.poll()] == [9]
