"""A data file's bytes as text: unpacked and decoded, or refused with the command that helps."""

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
from tinyllama_lab.errors import DataError, EncodingError, shown

COMPRESSED = (".gz", ".bz2", ".xz")  # what the standard library unpacks
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DECOMPRESS: dict[bytes, Callable[[bytes], bytes]] = {  # by the first bytes, a regular expression
    rb"\x1f\x8b": gzip.decompress,
    rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)": bz2.decompress,
    rb"\xfd7zXZ\0": lzma.decompress,
}
_TOOLS = {".gz": "gzip -dc", ".bz2": "bzip2 -dc", ".xz": "xz -dc"}
_HEAD_BYTES = 512  # bytes that tell what a file is
_MAX_STRAY_LINES = 3  # at one end of a file: more of them are a part in another encoding
_MAX_LISTED = 20  # lines in a message
# a command that decodes each line as UTF-8 where it is, and else by a codec
_LINE_BY_LINE = (
    "python3 -c 'import sys; sys.stdout.buffer.writelines("
    'l if l.decode("utf-8", "ignore").encode() == l else l.decode("{}").encode() '
    "for l in sys.stdin.buffer)'"
)
_MIN_UTF8_RATIO = 0.05  # so many lines that are UTF-8, for each that is not, are it on purpose
_MAX_MISPLACED = 0.3  # of these may be misplaced
_MIN_NUL_SHARE = 0.2  # of the bytes: UTF-16 without a mark, not a stray NUL


@dataclass(frozen=True)
class DataFile:
    """A file to read, and the setting that names it or its folder."""

    path: Path
    setting: str = "data.path"
    folder: Path | None = None  # where `setting` names the folder
    errors: str = "strict"  # of `bytes.decode`: what is done about bytes that are not UTF-8

    def __str__(self) -> str:
        return shown(str(self.path), 300)

    @property
    def compression(self) -> str:
        """The suffix of its compression; empty where its name has none."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSED else ""

    @property
    def suffix(self) -> str:
        """The suffix of what is inside."""
        name = self.path.name
        return Path(name[: len(name) - len(self.compression)]).suffix.lower()

    def remedy(self, command: str, suffix: str = "", infix: str = "") -> str:
        """What to type to make another file of this one and read that.

        `{old}` and `{new}` in the command stand for the two names. The new one has `infix` before
        its suffix; without one, it is a name that no file has.
        """
        inner = Path(self.path.name[: len(self.path.name) - len(self.compression)])
        inner = inner.with_suffix("") if inner.suffix.lower() == ".zst" else inner
        suffix = suffix or inner.suffix.lower()
        new = self.path.with_name(f"{inner.stem}{infix}{suffix}")
        if not infix and new.exists():
            new = self.path.with_name(f"{inner.stem}.new{suffix}")
        old_word, new_word = shlex.quote(str(self.path)), shlex.quote(str(new))
        line = command.format(old=old_word, new=new_word)
        if self.folder is not None:
            return f"type {line} && rm {old_word}"
        return f"type {line} and set {typed(self.setting, str(new))}"

    def filter_remedy(self, command: str, infix: str = "") -> str:
        """What to type to pass what is inside through a command and read what comes out."""
        if self.compression:
            return self.remedy(
                f"{_TOOLS[self.compression]} < {{old}} | {command} > {{new}}", infix=infix
            )
        return self.remedy(f"{command} < {{old}} > {{new}}", infix=infix)


def read_text(file: DataFile) -> str:
    """The whole text of a file.

    Raises:
        EncodingError: most of it is UTF-8, and some lines are not.
        DataError: it is not UTF-8, nor UTF-16 or UTF-32 with a byte order mark, or damaged.
        OSError: it cannot be read.
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
    """What a file holds, unpacked where its first bytes say that it is packed.

    Raises:
        DataError: the archive is damaged, or one that the standard library does not read.
        OSError: it cannot be read.
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
            f"{file} must be whole, got an archive that cannot be unpacked "
            f"({shown(str(error))}); fetch or write it again"
        ) from None
    check_readable(file, content)
    return content


def check_readable(file: DataFile, head: bytes) -> None:
    """Refuse what begins like a file of another kind.

    Raises:
        DataError: with what it is and what to do.
    """
    kind = unsupported_kind(head[:_HEAD_BYTES], file.suffix)
    if kind is not None:
        raise DataError(f"{file} must hold rows, got {kind.description}; {remedy_for(file, kind)}")


def remedy_for(file: DataFile, kind: UnsupportedKind) -> str:
    """What to do with a file that holds no rows."""
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
        return DataError(f"{got}, and its encoding cannot be told; save it as UTF-8")
    read_as = _guesses_message(guesses, number if number != other_lines[0] else None)
    return DataError(f"{got}; its encoding is {read_as}, {_iconv(file, guesses[0][0])}")


def _bad_byte(file: DataFile, raw: bytes, line: int) -> str:
    """What is wrong with a line that is not UTF-8, and where its first such byte stands."""
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
    """Of some lines the one with the most bytes beyond ASCII, which tells most, and its number."""
    lines = raw.split(b"\n")
    most = max(numbers, key=lambda n: sum(byte > 127 for byte in lines[n - 1][:200]))
    return most, lines[most - 1]


def _two_encodings_error(
    file: DataFile, raw: bytes, utf8_lines: list[int], other_lines: list[int]
) -> DataError:
    """Why a file of which some lines are UTF-8 and others are not is refused."""
    if not _is_split_in_two(utf8_lines, other_lines):
        return _single_lines_error(file, raw, other_lines)
    lines = raw.split(b"\n")
    number, line = _most_informative_line(raw, other_lines)
    guesses = guess_encodings(b"\n".join(lines[number - 1] for number in other_lines), line)
    last = min(utf8_lines[-1], other_lines[-1])  # of the first part
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
    """Why a file is refused in which single lines are not UTF-8, and how to convert these alone.

    A line that holds letters in UTF-8 as well is damaged, not in another encoding.
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
    is_header = other_lines[0] == 1 and file.suffix in (".csv", ".tsv")
    error = DataError if is_header or 2 * len(other_lines) >= len(all_lines) else EncodingError
    return error(
        f"{_bad_byte(file, raw, other_lines[0])}: of {len(all_lines)} lines all are UTF-8 but for "
        f"{lines}; {remedy}"
    )


def _guesses_message(guesses: list[tuple[str, str]], line: int | None = None) -> str:
    """Which encodings it may be, and how to choose one; `line` is read where it is another."""
    (likeliest, excerpt), *others = guesses
    also = "".join(f", or {name}, which reads {text!r}" for name, text in others)
    reads = "which reads" if line is None else f"which reads line {line} as"
    choice = "if that looks right"
    if others:
        choice = f"with the encoding whose reading looks right in place of {likeliest}"
    return f"perhaps {likeliest}, {reads} {excerpt!r}{also}; {choice}"


def _non_ascii_lines(raw: bytes) -> tuple[list[int], list[int]]:
    """The lines beyond ASCII that are UTF-8, and those that are not, by their numbers."""
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
    """Whether all lines of one kind come before those of the other."""
    return utf8_lines[-1] < other_lines[0] or other_lines[-1] < utf8_lines[0]


def _list_lines(numbers: list[int]) -> str:
    first = ", ".join(map(str, numbers[:_MAX_LISTED]))
    more = len(numbers) - _MAX_LISTED
    return f"{first} and {more} more" if more > 0 else first


def _nul_error(file: DataFile, raw: bytes, text: str) -> DataError:
    line = text.count("\n", 0, text.index("\0")) + 1
    is_utf16 = _is_utf16(raw)
    remedy = _iconv(file, _utf16(raw)) if is_utf16 else file.filter_remedy("tr -d '\\000'")
    return DataError(f"{file} line {line} must be text, got a NUL byte; {remedy}")


def _is_utf16(raw: bytes) -> bool:
    """Whether every other byte may be the upper half of a letter, a line's end among them."""
    ends = max(raw.count(b"\n\0"), raw.count(b"\0\n"))
    return raw.count(0) >= _MIN_NUL_SHARE * len(raw) or 2 * ends > raw.count(b"\n") + 1


def _utf16(raw: bytes) -> str:
    return "UTF-16LE" if raw[1::2].count(0) >= raw[::2].count(0) else "UTF-16BE"


def _iconv(file: DataFile, encoding: str) -> str:
    return file.filter_remedy(f"iconv -f {encoding} -t UTF-8", ".utf8")
