"""A file or folder that is written atomically is the old or the complete new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinyllama_lab.study.files import atomic_folder, write_atomic


@pytest.mark.parametrize("name", ["fsync", "replace", "rename"])
def test_a_crash_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "folder" / "file.json"
    write_atomic(path, "old")

    def crash(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, crash)
        try:
            write_atomic(path, "new" * 10_000)
        except OSError:
            assert path.read_text() == "old"
        else:
            assert name == "rename"  # the other way to spell it
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "study" / "adapter"
    for files in (["a", "b"], ["c"]):
        with atomic_folder(folder) as temporary:
            for name in files:
                (temporary / name).write_text(name)
            assert not folder.exists() or names(folder) == ["a", "b"]  # until the block ends
        assert names(folder) == files
    assert names(folder.parent) == ["adapter"]


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with atomic_folder(folder) as temporary:
        (temporary / "old").write_text("")
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as temporary:
        (temporary / "half").write_text("")
        raise KeyboardInterrupt
    assert names(folder) == ["old"] and names(tmp_path) == ["adapter"]


def test_what_a_killed_process_left_does_not_get_into_the_folder(tmp_path: Path) -> None:
    (tmp_path / ".adapter.tmp").mkdir()
    (tmp_path / ".adapter.tmp" / "half").write_text("")
    with atomic_folder(tmp_path / "adapter") as temporary:
        (temporary / "file").write_text("")
    assert names(tmp_path) == ["adapter"] and names(tmp_path / "adapter") == ["file"]


def test_all_content_is_flushed_before_the_rename_and_the_rename_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    folder, flush = tmp_path / "model", os.fsync

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append((path.name, folder.exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with atomic_folder(folder) as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "weights").write_text("1")
    assert sorted(flushed[:-1]) == [(".model.tmp", False), ("below", False), ("weights", False)]
    assert flushed[-1] == (tmp_path.name, True)
