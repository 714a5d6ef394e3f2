"""Kinds of files that cannot be read as rows, how each is recognised, and what to do with it."""

from __future__ import annotations

import re
from typing import NamedTuple

_TABLE = "save its rows as CSV (UTF-8) in the program that opens it"
_SPREADSHEET = "in the spreadsheet program, save it as CSV (UTF-8)"
_PANDAS = (
    "with pandas, write its rows with "
    "DataFrame.to_json('rows.jsonl', orient='records', lines=True)"
)
_UNPACK = "and set {setting} to the result"

# magic bytes of letters alone could be the name of a CSV column, such as "ORCID": they count
# only together with a control byte, which no text holds
_BINARY = rb"(?=[\s\S]*[\0-\x08\x0e-\x1f\x7f])"


class UnsupportedKind(NamedTuple):
    """A kind of file that cannot be read.

    Attributes:
        description: what the file is, for the message "got ...".
        advice: what to do. `{old}` stands for the file, `{table}` for its name with `.tsv`,
            `{setting}` for the setting that names it, and `{set_table}` for that setting with
            `{table}`.
        magic: a regular expression for the first bytes. The default matches no file.
        suffixes: suffixes of such files, used when the first bytes do not tell.
        command: a shell command that converts the file `{old}` to `{new}`, instead of `advice`.
        valid_suffixes: suffixes with which these first bytes are supported. `{new}` gets the
            first of them.
    """

    description: str
    advice: str = ""
    magic: bytes = b"(?!)"
    suffixes: tuple[str, ...] = ()
    command: str = ""
    valid_suffixes: tuple[str, ...] = ()


# the first match wins: an Office document is also a ZIP archive
UNSUPPORTED_KINDS = (
    UnsupportedKind(
        "a Git LFS pointer instead of the file",
        "type git lfs pull in its repository, or download the file itself",
        rb"version https://git-lfs",
    ),
    UnsupportedKind(
        "a web page, such as a login page",
        "download the file itself",
        rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html[\s>])",
        (".html", ".htm"),
    ),
    UnsupportedKind(
        "XML", "write its rows as JSON lines or CSV", rb"(?:\xef\xbb\xbf)?\s*<\?xml", (".xml",)
    ),
    UnsupportedKind(
        "a spreadsheet or an Office document",
        _SPREADSHEET,
        rb"(?s)PK\x03\x04.{26}(?:\[Content_Types\]|_rels/|docProps/|xl/|mimetypeapplication/vnd)"
        rb"|\xd0\xcf\x11\xe0",
        (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers"),
    ),
    UnsupportedKind(
        "a ZIP archive",
        f"type unzip {{old}}, which asks for a password if it needs one, {_UNPACK}",
        rb"PK\x03\x04|PK\x05\x06",
        (".zip",),
    ),
    UnsupportedKind(
        "a document", _TABLE, rb"%PDF|\{\\rtf", (".docx", ".doc", ".odt", ".rtf", ".pdf")
    ),
    UnsupportedKind(
        "a tar archive",
        f"type tar -xf {{old}} {_UNPACK}",
        _BINARY + rb"[\s\S]{257}ustar",
        (".tar", ".tgz", ".tbz2", ".txz"),
    ),
    UnsupportedKind(
        "a packed archive",
        f"unpack it {_UNPACK}",
        rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07",
        (".7z", ".rar", ".lz4", ".br", ".z"),
    ),
    UnsupportedKind(
        "a zstd archive",
        magic=rb"\x28\xb5\x2f\xfd",
        suffixes=(".zst",),
        command="zstd -dc < {old} > {new}",
    ),
    UnsupportedKind(
        "a Parquet file",
        magic=_BINARY + rb"PAR1",
        command="cp {old} {new}",
        valid_suffixes=(".parquet",),
    ),
    UnsupportedKind(
        "an Arrow file",
        magic=_BINARY + rb"ARROW1",
        command="cp {old} {new}",
        valid_suffixes=(".arrow", ".feather"),
    ),
    UnsupportedKind(
        "an SQLite database",
        f"{_TABLE}, or type sqlite3 -header -csv {{old}} 'select * from TABLE' > rows.csv with "
        "the name of the table",
        rb"SQLite format 3\0",
        (".sqlite", ".sqlite3", ".db"),
    ),
    UnsupportedKind(
        "a pickle, which may run any code when it is read",
        _PANDAS,
        rb"\x80[\x02-\x05](?:\x95|c|\}|\]|\()",
        (".pkl", ".pickle", ".pt", ".pth", ".joblib"),
    ),
    UnsupportedKind(
        "arrays",
        _PANDAS,
        rb"\x93NUMPY|\x89HDF|Obj\x01|" + _BINARY + rb"ORC",
        (".npy", ".npz", ".h5", ".hdf5", ".avro", ".orc", ".tfrecord"),
    ),
    UnsupportedKind(
        "an image, audio or video",
        "only text is trained on: write the text as JSON lines or CSV",
        rb"\x89PNG|\xff\xd8\xff|" + _BINARY + rb"(?:GIF8|RIFF|ID3|[\s\S]{4}ftyp)",
        (".png", ".jpg", ".jpeg", ".gif", ".webp", ".wav", ".mp3", ".flac", ".mp4", ".svg"),
    ),
    UnsupportedKind(
        "a chat exported from WhatsApp",
        'write each conversation as one line {{"messages": [{{"role": "user", "content": '
        '"..."}}, ...]}}, with the role assistant for the speaker to imitate',
        rb"(?:\xef\xbb\xbf)?(?:\xe2\x80\x8e)?\[?\d{1,4}[./-]\d\d?[./-]\d{1,4},? \d\d?:\d\d"
        rb"[^\n]{0,9}(?:\] | - )[^\n:]{1,60}: ",
        valid_suffixes=(".csv", ".tsv", ".json", ".jsonl"),
    ),
    UnsupportedKind(
        "text without columns",
        "if it is a table, type cp {old} {table} and set {set_table}; otherwise write one object "
        'per line, such as {{"text": "..."}}',
        suffixes=(".txt", ".text", ".dat", ".md"),
    ),
    UnsupportedKind(
        "YAML or a program",
        "write its rows as JSON lines",
        suffixes=(".yaml", ".yml", ".toml", ".py", ".ipynb"),
    ),
)


def unsupported_kind(head: bytes, suffix: str) -> UnsupportedKind | None:
    """Return the kind of an unsupported file by its first bytes and its suffix.

    Returns:
        The kind; None if the file may hold rows.
    """
    by_bytes = (
        kind
        for kind in UNSUPPORTED_KINDS
        if re.match(kind.magic, head) and suffix not in kind.valid_suffixes
    )
    by_name = next((kind for kind in UNSUPPORTED_KINDS if suffix in kind.suffixes), None)
    if by_name and head.startswith(b"PK"):  # many formats are ZIP archives inside
        return by_name
    return next(by_bytes, by_name)
