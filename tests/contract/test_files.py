"""A file or folder that is written atomically is the old or the complete new one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tinyllama_lab.study.files import SHARED_BYTES, atomic_folder, share_equal, write_atomic


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


def test_files_in_an_atomic_folder_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            with atomic_folder(tmp_path / "model") as folder:
                (folder / "weights").touch(0o600)
                (folder / "below").mkdir()
                (folder / "below" / "more").touch(0o600)
        finally:
            os.umask(before)
        files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
        assert [path.stat().st_mode & 0o777 for path in files] == [mode, mode]


def test_equal_large_files_are_one_file_on_disk_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    large = b"x" * SHARED_BYTES
    for folder, content in ((first, b"1"), (second, b"2")):
        folder.mkdir()
        for name, text in (("equal", large), ("small", b"s"), ("weights", large + content)):
            (folder / name).write_bytes(text)
    with monkeypatch.context() as patch:  # a file system without hard links
        patch.setattr(os, "link", _no_links)
        share_equal(second, first)
    assert (second / "equal").stat().st_nlink == 1
    share_equal(second, first)
    assert (second / "equal").samefile(first / "equal")
    assert not (second / "small").samefile(first / "small")
    assert (second / "weights").read_bytes() == large + b"2"
    assert sorted(path.name for path in second.iterdir()) == ["equal", "small", "weights"]
    shutil.rmtree(first)
    assert (second / "equal").read_bytes() == large


def _no_links(*arguments: object, **options: object) -> None:
    raise OSError("no links here")
