"""Turns the bytes of a data file into text: decompresses and decodes them.

A file that is not UTF-8 is refused, never guessed: the message shows how the likeliest encodings
read one of its lines, and gives a shell command that converts the file.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import shlex
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyllama_lab.config.command import typed
from tinyllama_lab.data.reading.encodings import ENCODINGS, guess_encodings, misplaced_share
from tinyllama_lab.data.reading.unsupported import UnsupportedKind, unsupported_kind
from tinyllama_lab.errors import DataError, EncodingError, one_line, shown

COMPRESSED = (".gz", ".bz2", ".xz")  # what the standard library decompresses
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # first, since it begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# by a regular expression for the first bytes
_DECOMPRESS: dict[bytes, Callable[[bytes], bytes]] = {
    rb"\x1f\x8b": gzip.decompress,
    rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)": bz2.decompress,
    rb"\xfd7zXZ\0": lzma.decompress,
}
_TOOLS = {".gz": "gzip -dc", ".bz2": "bzip2 -dc", ".xz": "xz -dc"}
_HEAD_BYTES = 512  # enough to recognise a kind of file by its magic bytes
# at one end of a file; more of them are a part in another encoding
_MAX_STRAY_LINES = 3
_MAX_LISTED = 20  # lines in a message
# keeps lines that are UTF-8, and decodes every other line by the codec
_LINE_BY_LINE = (
    "python3 -c 'import sys; sys.stdout.buffer.writelines("
    'l if l.decode("utf-8", "ignore").encode() == l else l.decode("{}").encode() '
    "for l in sys.stdin.buffer)'"
)
# UTF-8 lines per other line; fewer of them are valid UTF-8 by chance
_MIN_UTF8_RATIO = 0.05
_MAX_MISPLACED = 0.3  # the highest share of misplaced characters in a plausible guess
_MIN_NUL_SHARE = 0.2  # of all bytes; fewer are stray NUL bytes, not UTF-16


@dataclass(frozen=True)
class DataFile:
    """A file to read, and the setting that names it or its folder."""

    path: Path
    setting: str = "data.path"
    folder: Path | None = None  # the folder, if that is what `setting` names
    errors: str = "strict"  # the error handler of `bytes.decode`

    def __str__(self) -> str:
        return shown(str(self.path), 300)

    @property
    def compression(self) -> str:
        """The suffix of the compression, such as `.gz`; empty for an uncompressed file."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSED else ""

    @property
    def suffix(self) -> str:
        """The suffix of the content in lower case: `.csv` for `a.csv.gz`."""
        name = self.path.name
        return Path(name[: len(name) - len(self.compression)]).suffix.lower()

    def remedy(self, command: str, suffix: str = "", infix: str = "") -> str:
        """Return what to type to convert this file and to read the result.

        Args:
            command: a shell command; `{old}` and `{new}` stand for the names of the two files.
            suffix: of the new file; by default that of this one, without its compression.
            infix: what the new name has before its suffix. Without it, `.new` is put
                there if a file has the name already.
        """
        inner = Path(self.path.name[: len(self.path.name) - len(self.compression)])
        # a zstd archive is unpacked by the command, so the new name must not end in .zst
        inner = inner.with_suffix("") if inner.suffix.lower() == ".zst" else inner
        suffix = suffix or inner.suffix.lower()
        new = self.path.with_name(f"{inner.stem}{infix}{suffix}")
        if not infix and new.exists():
            new = self.path.with_name(f"{inner.stem}.new{suffix}")
        old_word, new_word = shlex.quote(str(self.path)), shlex.quote(str(new))
        line = command.format(old=old_word, new=new_word)
        if self.folder is not None:  # all files of the folder are read: the new one replaces this
            return f"type {line} && rm {old_word}"
        return f"type {line} and set {typed(self.setting, str(new))}"

    def filter_remedy(self, command: str, infix: str = "") -> str:
        """Return what to type to pipe the content through a command and to read the result."""
        if self.compression:
            return self.remedy(
                f"{_TOOLS[self.compression]} < {{old}} | {command} > {{new}}", infix=infix
            )
        return self.remedy(f"{command} < {{old}} > {{new}}", infix=infix)


def read_text(file: DataFile) -> str:
    """Return the whole text of a file.

    Raises:
        EncodingError: some lines are not UTF-8, and most are.
        DataError: the file is neither UTF-8 nor UTF-16 or UTF-32 with a byte order mark, or it
            holds a NUL byte.
        OSError: the file cannot be read.
    """
    raw = read_bytes(file)
    encoding = next((name for mark, name in _BOMS if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding, file.errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _not_utf8_error(file, raw, error) from None
    if "\0" in text:
        raise _nul_error(file, raw, text)
    return text


def read_bytes(file: DataFile) -> bytes:
    """Return the content of a file, decompressed if its first bytes are those of an archive.

    Raises:
        DataError: the archive is damaged, or the standard library cannot read it.
        OSError: the file cannot be read.
    """
    raw = file.path.read_bytes()
    check_readable(file, raw)
    decompress = next((f for magic, f in _DECOMPRESS.items() if re.match(magic, raw)), None)
    if decompress is None:
        return raw
    try:
        content = decompress(raw)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{file} must be a complete archive, got one that cannot be unpacked "
            f"({one_line(str(error), 80)}); download or write it again"
        ) from None
    check_readable(file, content)
    return content


def check_readable(file: DataFile, head: bytes) -> None:
    """Refuse content whose first bytes are those of an unsupported kind of file.

    Raises:
        DataError: the content is unsupported; the message says what it is and what to do.
    """
    kind = unsupported_kind(head[:_HEAD_BYTES], file.suffix)
    if kind is not None:
        raise DataError(f"{file} must hold rows, got {kind.description}; {remedy_for(file, kind)}")


def remedy_for(file: DataFile, kind: UnsupportedKind) -> str:
    """Return what to do with a file of an unsupported kind."""
    if kind.command:
        return file.remedy(kind.command, *kind.valid_suffixes[:1])
    table = str(file.path.with_suffix(".tsv"))
    return kind.advice.format(
        old=shlex.quote(str(file.path)),
        table=shlex.quote(table),
        set_table=typed(file.setting, table),
        setting=file.setting,
    )


def _not_utf8_error(file: DataFile, raw: bytes, error: UnicodeDecodeError) -> DataError:
    """Return the error for text that is not UTF-8.

    There are four cases: a few stray lines, UTF-16 without a byte order mark, two parts in two
    encodings, and a whole file in another encoding.
    """
    got = _bad_byte(file, raw, raw.count(b"\n", 0, error.start) + 1)
    utf8_lines, other_lines = _non_ascii_lines(raw)
    if len(other_lines) < len(utf8_lines) and not (
        _is_split_in_two(utf8_lines, other_lines) and len(other_lines) > _MAX_STRAY_LINES
    ):
        return _single_lines_error(file, raw, other_lines)
    if _is_utf16(raw):
        return DataError(f"{got}, as it is in {_utf16(raw)}; {_iconv(file, _utf16(raw))}")
    if len(utf8_lines) >= _MIN_UTF8_RATIO * len(other_lines):
        return _two_encodings_error(file, raw, utf8_lines, other_lines)
    number, line = _most_informative_line(raw, other_lines)
    guesses = guess_encodings(raw, line)
    if not guesses:
        return DataError(f"{got}, and its encoding cannot be detected; save it as UTF-8")
    read_as = _guesses_message(guesses, number if number != other_lines[0] else None)
    return DataError(f"{got}; its encoding is {read_as}, {_iconv(file, guesses[0][0])}")


def _bad_byte(file: DataFile, raw: bytes, line: int) -> str:
    """Return the start of a message: the first byte of a line that is not UTF-8.

    Args:
        line: the number of the line, from 1.
    """
    before = b"\n".join(raw.split(b"\n")[: line - 1])
    start = len(before) + (line > 1)
    try:
        raw[start:].decode()
    except UnicodeDecodeError as error:
        start += error.start
    return (
        f"{file} must be UTF-8 text, got the byte 0x{raw[start]:02x} at byte offset {start} "
        f"(line {line})"
    )


def _most_informative_line(raw: bytes, numbers: list[int]) -> tuple[int, bytes]:
    """Return the number and the bytes of the line with the most bytes beyond ASCII.

    That line shows best whether a guessed encoding is right.
    """
    lines = raw.split(b"\n")
    most = max(numbers, key=lambda n: sum(byte > 127 for byte in lines[n - 1][:200]))
    return most, lines[most - 1]


def _two_encodings_error(
    file: DataFile, raw: bytes, utf8_lines: list[int], other_lines: list[int]
) -> DataError:
    """Return the error for a file whose first part has one encoding, and the rest another."""
    if not _is_split_in_two(utf8_lines, other_lines):
        return _single_lines_error(file, raw, other_lines)
    lines = raw.split(b"\n")
    number, line = _most_informative_line(raw, other_lines)
    guesses = guess_encodings(b"\n".join(lines[number - 1] for number in other_lines), line)
    last = min(utf8_lines[-1], other_lines[-1])  # the last line of the first part
    if not guesses:
        return _single_lines_error(file, raw, other_lines)
    parts = ["UTF-8", "another"] if utf8_lines[-1] == last else ["another", "UTF-8"]
    iconv = [f" | iconv -f {guesses[0][0]} -t UTF-8" * (part == "another") for part in parts]
    source = f"{_TOOLS[file.compression]} < {{old}} |" if file.compression else "cat {old} |"
    command = (
        f"{{{{ {source} head -n {last}{iconv[0]}; {source} tail -n +{last + 1}{iconv[1]}; }}}} "
        "> {new}"
    )
    read_as = _guesses_message(guesses, number if number != other_lines[0] else None)
    return DataError(
        f"{_bad_byte(file, raw, other_lines[0])}: two encodings, {parts[0]} up to line {last} and "
        f"then {parts[1]}; the other is {read_as}, {file.remedy(command, infix='.utf8')}"
    )


def _single_lines_error(file: DataFile, raw: bytes, other_lines: list[int]) -> DataError:
    """Return the error for a file with single lines that are not UTF-8.

    A line that holds UTF-8 letters as well is damaged, not in another encoding. If there is one,
    the message gives no command that converts the lines.
    """
    all_lines = raw.removesuffix(b"\n").split(b"\n")
    bad_lines = [all_lines[number - 1] for number in other_lines]
    lines = f"line{'s' if len(other_lines) > 1 else ''} {_list_lines(other_lines)}"
    remedy = f"correct or remove {lines}"
    if all(line.decode("utf-8", "ignore").isascii() for line in bad_lines):
        guesses = guess_encodings(b"\n".join(bad_lines), bad_lines[0])
        codecs_of = {iconv: codec for codec, iconv in ENCODINGS.items()}
        guesses = [
            (codecs_of[name], text)
            for name, text in guesses
            if misplaced_share(text) <= _MAX_MISPLACED
        ]
        if guesses:
            command = file.filter_remedy(_LINE_BY_LINE.format(guesses[0][0]), ".utf8")
            read_as = _guesses_message(guesses)
            remedy = f"the encoding is {read_as}, convert these lines alone: {command}"
    # with a damaged header, or mostly damaged lines, the other rows are not worth checking
    is_header = other_lines[0] == 1 and file.suffix in (".csv", ".tsv")
    error = DataError if is_header or 2 * len(other_lines) >= len(all_lines) else EncodingError
    return error(
        f"{_bad_byte(file, raw, other_lines[0])}: all {len(all_lines)} lines are UTF-8 except "
        f"{lines}; {remedy}"
    )


def _guesses_message(guesses: list[tuple[str, str]], line: int | None = None) -> str:
    """Return which encodings are likely, how each reads a line, and how to choose.

    Args:
        guesses: names of encodings for iconv, the likeliest first, each with its reading.
        line: the number of the line that was read, if the message has not named it yet.
    """
    (likeliest, excerpt), *others = guesses
    also = "".join(f", or {name}, which reads {text!r}" for name, text in others)
    reads = "which reads" if line is None else f"which reads line {line} as"
    choice = "if that looks right"
    if others:
        choice = f"with the encoding whose reading looks right in place of {likeliest}"
    return f"perhaps {likeliest}, {reads} {excerpt!r}{also}; {choice}"


def _non_ascii_lines(raw: bytes) -> tuple[list[int], list[int]]:
    """Return the numbers of the lines beyond ASCII: those that are UTF-8, and the others."""
    utf8_lines, other_lines = [], []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.isascii():
            try:
                line.decode()
                utf8_lines.append(number)
            except UnicodeDecodeError:
                other_lines.append(number)
    return utf8_lines, other_lines


def _is_split_in_two(utf8_lines: list[int], other_lines: list[int]) -> bool:
    """Return whether all UTF-8 lines come before all other lines, or after them."""
    return utf8_lines[-1] < other_lines[0] or other_lines[-1] < utf8_lines[0]


def _list_lines(numbers: list[int]) -> str:
    """Return line numbers for a message, at most `_MAX_LISTED`."""
    first = ", ".join(map(str, numbers[:_MAX_LISTED]))
    more = len(numbers) - _MAX_LISTED
    return f"{first} and {more} more" if more > 0 else first


def _nul_error(file: DataFile, raw: bytes, text: str) -> DataError:
    line = text.count("\n", 0, text.index("\0")) + 1
    is_utf16 = _is_utf16(raw)
    remedy = _iconv(file, _utf16(raw)) if is_utf16 else file.filter_remedy("tr -d '\\000'")
    return DataError(f"{file} line {line} must be text, got a NUL byte; {remedy}")


def _is_utf16(raw: bytes) -> bool:
    """Return whether the bytes look like UTF-16 without a byte order mark.

    Either many bytes are NUL, as in Latin text, or most line feeds have a NUL byte next to them,
    as in Chinese text.
    """
    ends = max(raw.count(b"\n\0"), raw.count(b"\0\n"))
    return raw.count(0) >= _MIN_NUL_SHARE * len(raw) or 2 * ends > raw.count(b"\n") + 1


def _utf16(raw: bytes) -> str:
    """Return the byte order: the half of the bytes with more NULs is the upper one."""
    return "UTF-16LE" if raw[1::2].count(0) >= raw[::2].count(0) else "UTF-16BE"


def _iconv(file: DataFile, encoding: str) -> str:
    return file.filter_remedy(f"iconv -f {encoding} -t UTF-8", ".utf8")
