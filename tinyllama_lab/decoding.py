"""A data file's bytes as text: unpacked and decoded, or refused with the command that helps."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import shlex
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyllama_lab.command import typed
from tinyllama_lab.errors import DataError, shown

PACKED = (".gz", ".bz2", ".xz")  # what the standard library unpacks
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNPACK: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\0": lzma.decompress,
}
_TOOLS = {".gz": "gzip -dc", ".bz2": "bzip2 -dc", ".xz": "xz -dc"}
_FOREIGN = {  # what the first bytes say that cannot be read as text, and the command that helps
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "zstd -dc < {old} > {new}"),
    b"PK\x03\x04": ("a ZIP archive or a spreadsheet", "unzip {old}"),
    b"PAR1": ("a Parquet file", "cp {old} {parquet}"),
}
_MANY_NULS = 0.2  # of the bytes: UTF-16 without a mark, not a stray NUL


@dataclass(frozen=True)
class DataFile:
    """A file to read, and the setting that names it or its folder."""

    path: Path
    setting: str = "data.path"
    folder: Path | None = None  # where `setting` names the folder

    def __str__(self) -> str:
        return shown(str(self.path), 300)

    @property
    def packed(self) -> str:
        """The suffix of its compression; empty where its name has none."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in PACKED else ""

    @property
    def suffix(self) -> str:
        """The suffix of what is inside."""
        name = self.path.name
        return Path(name[: len(name) - len(self.packed)]).suffix.lower()

    def remedy(self, command: str, suffix: str = "") -> str:
        """What to type to make another file of this one and read that.

        `{old}` and `{new}` in the command stand for the two names.
        """
        name = self.path.name[: len(self.path.name) - len(self.packed)]
        new = self.path.with_name(f"{Path(name).stem}.utf8{suffix or self.suffix}")
        old_word, new_word = shlex.quote(str(self.path)), shlex.quote(str(new))
        line = command.format(old=old_word, new=new_word)
        if self.folder is not None:
            return f"type {line} && rm {old_word}"
        return f"type {line} and set {typed(self.setting, str(new))}"


def read_text(file: DataFile) -> str:
    """The whole text of a file.

    Raises:
        DataError: it is not UTF-8, nor UTF-16 or UTF-32 with a byte order mark, or damaged.
        OSError: it cannot be read.
    """
    raw = read_bytes(file)
    encoding = next((name for mark, name in _BOMS if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, raw, error) from None
    if "\0" in text:
        raise _nul(file, raw, text)
    return text


def read_bytes(file: DataFile) -> bytes:
    """What a file holds, unpacked where its first bytes say that it is packed.

    Raises:
        DataError: the archive is damaged, or one that the standard library does not read.
        OSError: it cannot be read.
    """
    raw = file.path.read_bytes()
    for mark, (what, command) in _FOREIGN.items():
        if raw.startswith(mark) and file.suffix != ".parquet":
            raise DataError(f"{file} must hold text, got {what}; {_foreign_remedy(file, command)}")
    unpack = next((unpack for mark, unpack in _UNPACK.items() if raw.startswith(mark)), None)
    try:
        return unpack(raw) if unpack else raw
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{file} must be whole, got an archive that cannot be unpacked "
            f"({shown(str(error))}); fetch or write it again"
        ) from None


def _foreign_remedy(file: DataFile, command: str) -> str:
    if "unzip" in command:
        if file.suffix in (".csv", ".tsv"):
            return "in the spreadsheet program, save it as CSV (UTF-8)"
        return f"type {command.format(old=shlex.quote(str(file.path)))} and name what comes out"
    if "{parquet}" in command:
        return file.remedy(command.replace("{parquet}", "{new}"), ".parquet")
    return file.remedy(command)


def _not_utf8(file: DataFile, raw: bytes, error: UnicodeDecodeError) -> DataError:
    line = raw.count(b"\n", 0, error.start) + 1
    return DataError(
        f"{file} must be UTF-8 text, got the byte 0x{raw[error.start]:02x} at byte offset "
        f"{error.start} (line {line}), as it is in {_likely(raw)}; {_iconv(file, _likely(raw))}"
    )


def _nul(file: DataFile, raw: bytes, text: str) -> DataError:
    line = text.count("\n", 0, text.index("\0")) + 1
    if raw.count(0) >= _MANY_NULS * len(raw):
        way_out = _iconv(file, _likely(raw))
    else:
        way_out = file.remedy(f"{_unpack_command(file)}tr -d '\\000' {_source(file)}> {{new}}")
    return DataError(f"{file} line {line} must be text, got a NUL byte; {way_out}")


def _likely(raw: bytes) -> str:
    """The name that iconv has for the likeliest encoding."""
    if raw.count(0) >= _MANY_NULS * len(raw):
        return "UTF-16LE" if raw[1::2].count(0) >= raw[::2].count(0) else "UTF-16BE"
    try:
        raw.decode("cp1252")
    except UnicodeDecodeError:
        return "ISO-8859-1"
    return "CP1252"


def _iconv(file: DataFile, encoding: str) -> str:
    command = f"{_unpack_command(file)}iconv -f {encoding} -t UTF-8 {_source(file)}> {{new}}"
    return file.remedy(command)


def _unpack_command(file: DataFile) -> str:
    return f"{_TOOLS[file.packed]} < {{old}} | " if file.packed else ""


def _source(file: DataFile) -> str:
    return "" if file.packed else "< {old} "
