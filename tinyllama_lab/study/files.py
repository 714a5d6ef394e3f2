"""Files and folders: typed paths, what can be written to, and how to write it atomically."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from tinyllama_lab.metrics import MIB

# both are safe; libyaml is ten times faster, but ends the process where a long file nests deeply
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
TEMPORARY = ".*.tmp"  # names of what is not complete yet
SHARED_BYTES = 2**16  # smaller files are not worth a link, and people may edit them


def user_path(text: str) -> Path:
    """Return a typed path with `~` expanded; without a home folder, `~` stays as it is."""
    return Path(os.path.expanduser(text))


def exists(text: str) -> bool:
    """Return whether a typed path exists; False for a name that no file system accepts."""
    try:
        return bool(text) and user_path(text).exists()
    except (OSError, ValueError):  # too long, no permission, or a NUL in the name
        return False


def write_atomic(path: Path, text: str, is_durable: bool = True) -> None:
    """Replace a file so that a reader, or a crash, leaves the old or the new text, never a mix.

    Args:
        path: the file.
        text: its content.
        is_durable: whether to wait until it is on the disk, and survives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # next to the target, because a rename is atomic only within one file system; with a random
    # name, because several processes may write the same file
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        if is_durable:
            publish(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: it cannot be read, or is no file; to open a pipe would wait for ever.
    """
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a file", str(path))
    return file


def read_file(path: Path) -> bytes:
    """Return the content of a file; raise what `open_file` raises."""
    with open_file(path) as file:
        return file.read()


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not YAML.
    """
    content = read_file(path)
    loader = _Loader if len(content) < 2**14 else yaml.SafeLoader
    try:
        return loader(content.decode()).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def yaml_text(content: Any) -> str:
    """Return YAML of plain dictionaries, lists and values."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False)
    return text


def make_way(folder: Path, files: Iterable[Path], folders: Iterable[Path]) -> None:
    """Remove what stands where files and folders will be written and is none, and temporaries."""
    for path in files:
        _clear(path)
    for path in folders:
        _clear(path, is_folder=True)
    remove_temporaries(folder.rglob(TEMPORARY))


def _clear(path: Path, is_folder: bool = False) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if stat.S_ISDIR(mode) and not is_folder:
        shutil.rmtree(path)
    elif not (stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and not is_folder)):
        path.unlink()


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove what killed processes have left half written."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def no_link(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=no_link)`, but fail where the path is a link.

    A file that is written in place could otherwise be any file of the user that a link names.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Create or replace a folder so that a crash leaves a complete folder or none.

    Yields an empty folder to fill, which is then renamed to `folder`. After an exception in the
    `with` block it is removed, and `folder` stays as it was. Only one process may write at a time.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        make_readable(temporary)
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_readable(folder: Path) -> None:
    """Give the files in a folder the permissions that other new files get.

    safetensors writes files that only their owner may read, whatever the umask says.
    """
    # of the folder, which the umask made: a process cannot read its umask without setting it
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o666 != mode:
            path.chmod(mode)


def share_equal(folder: Path, other: Path) -> None:
    """Make large files of a folder, equal to those of the same name in `other`, one file on disk.

    Without hard links, as on some network mounts, they stay as they are.
    """
    for path in folder.iterdir():
        twin = other / path.name
        is_large = path.is_file() and path.stat().st_size >= SHARED_BYTES
        if is_large and twin.is_file() and filecmp.cmp(path, twin, shallow=False):
            link = path.with_name(f".{path.name}.link")
            with suppress(OSError):
                link.hardlink_to(twin)
                link.replace(path)


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder to `path`, and replace what is there.

    All content is flushed to disk before the rename, and the rename before the function returns.
    So a power cut leaves no empty or incomplete file under the name `path`.
    """
    # content first: after a power cut, a renamed file whose content was not flushed may be empty
    content = temporary.rglob("*") if temporary.is_dir() else ()
    for written in (*content, temporary):
        _sync(written)
    if temporary.is_dir() and path.is_symlink():
        path.unlink()  # the link itself: what it leads to is not ours
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # a rename cannot replace a folder with files
    temporary.replace(path)
    _sync(path.parent)  # the rename is an entry of this folder


def _sync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_problem(folder: Path) -> str | None:
    """Return why a folder cannot be written to; None if it can.

    The folder may not exist yet: then its nearest existing parent is tested. Nothing is left
    behind.
    """
    target = parent = folder.absolute()
    while not os.path.lexists(parent):  # the root always exists
        parent = parent.parent
    name = "it" if parent == target else str(parent)
    if not os.path.isdir(parent):
        return f"{name} is {'a file' if os.path.exists(parent) else 'a link that leads nowhere'}"
    missing = [os.fsencode(part) for part in target.relative_to(parent).parts]
    try:
        if max(map(len, missing), default=0) > os.pathconf(parent, "PC_NAME_MAX"):
            return "a name in it is too long"
        # os.access is wrong for root and on network mounts; on Linux this file has no name
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        return f"{name} cannot be written to ({error.strerror})"


def free_mib(folder: Path) -> int | None:
    """Return the free disk space in MiB at a folder that may not exist yet; None if unknown."""
    try:
        usage = shutil.disk_usage(_existing(folder))
    except OSError:
        return None
    return usage.free // MIB if usage.total else None  # some network mounts report 0 of 0


def is_same_disk(one: Path, other: Path) -> bool:
    """Return whether two folders, which may not exist yet, share their free space."""
    try:
        return _existing(one).stat().st_dev == _existing(other).stat().st_dev
    except OSError:
        return False


def _existing(folder: Path) -> Path:
    """Return a folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def utf8_problem(text: str) -> str | None:
    """Return why a file name cannot be encoded as UTF-8; None if it can.

    Every file of this project is UTF-8, so a name that is written into one must be too.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        if sys.getfilesystemencoding() != "utf-8":
            return f"{text!r} cannot be read in this locale; set PYTHONUTF8=1"
        return f"{text!r} must be in UTF-8; if a file has this name, rename it"
    return None
