"""Reads delimited text, Parquet and Arrow files; `json_rows.py` reads JSON.

pyarrow is imported only when one of its files is read.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, BinaryIO

from tinyllama_lab.data.formats.cells import (
    decode_bytes,
    drop_nulls,
    readable_floats,
)
from tinyllama_lab.data.reading.decoding import DataFile, check_readable, read_bytes, read_text
from tinyllama_lab.data.reading.json_rows import Record, read_json
from tinyllama_lab.errors import DataError, one_line, shown

_DELIMITERS = ",;\t|"
_SNIFFED_ROWS = 50
_MARKDOWN_RULE = re.compile(r"[\s:]*-[-\s:]*")  # the line below the header of a Markdown table
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")  # an index without a name, in Parquet


def read_csv(file: DataFile) -> list[Record]:
    """Return the rows of delimited text.

    The delimiter is the comma, semicolon, tab or bar that cuts the rows most evenly.

    Raises:
        DataError: quotes are damaged, two columns have one name, a row has more or fewer fields
            than the header, a title stands above the header, or the file is a Markdown table.
    """
    text = read_text(file)
    sep_line = re.match(r"sep=(.)\r?\n", text)  # Excel names the delimiter so
    text = text[sep_line.end() :] if sep_line else text
    # a cell may be a whole document; the limit holds for the process, so it is restored
    old_limit = csv.field_size_limit(max(len(text), 1))
    try:
        delimiter = sep_line[1] if sep_line else _delimiter(text, file)
        rows = list(_csv_rows(text, delimiter, file))
        return _to_records(rows, delimiter, file)
    finally:
        csv.field_size_limit(old_limit)


def _csv_rows(text: str, delimiter: str, file: DataFile) -> Iterator[tuple[int, list[str]]]:
    """Yield every row that is not blank, with the number of the line on which it ends.

    Raises:
        DataError: the quotes are damaged.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(
            f"{file} line {reader.line_num} must be valid CSV, got: {error}; close the quotes, "
            "and double those inside a field"
        ) from None


def _delimiter(text: str, file: DataFile) -> str:
    """Return the delimiter that cuts most of the first rows into as many cells as the header.

    If two do so equally well, the one with more cells wins, then the first of `_DELIMITERS`.
    """
    # `max` keeps the first of equals, so a .tsv file tries tabs first
    delimiters = _DELIMITERS if file.suffix == ".csv" else "\t" + _DELIMITERS

    def score(delimiter: str) -> tuple[float, int]:
        rows = [len(cells) for _, cells in _first_rows(text, delimiter, file)]
        width = rows[0] if rows else 1
        alike = sum(count == width for count in rows) / max(len(rows), 1)
        return (alike, width) if width > 1 else (0.0, 1)

    return max(delimiters, key=score)


def _first_rows(text: str, delimiter: str, file: DataFile) -> list[tuple[int, list[str]]]:
    """Return the first rows; fewer where the quotes are damaged, which `read_csv` reports."""
    rows = []
    try:
        for row in islice(_csv_rows(text[: 2**20], delimiter, file), _SNIFFED_ROWS):
            rows.append(row)
    except DataError:
        pass  # `read_csv` meets the same damage with the chosen delimiter, and reports it
    return rows


def _header_below(rows: list[tuple[int, list[str]]]) -> int | None:
    """Return the line that seems to be the header below a title; None without a title.

    A title is a first line that fills at most half as many cells as most of the rows below it.
    """
    rows = rows[:_SNIFFED_ROWS]
    filled = [sum(bool(cell.strip()) for cell in cells) for _, cells in rows]
    usual = Counter(filled[1:]).most_common(1)[0][0] if len(filled) > 2 else 0
    is_title = usual > 1 and 2 * filled[0] <= usual and rows[0][1][0].strip()
    if not is_title or filled.count(usual) * 2 <= len(filled):
        return None
    end, cells = rows[next(n for n, count in enumerate(filled) if count >= usual)]
    return end - sum(cell.count("\n") for cell in cells)


def _to_records(rows: list[tuple[int, list[str]]], delimiter: str, file: DataFile) -> list[Record]:
    """Return one record per row below the header.

    Args:
        rows: the cells of every row, with the number of the line on which it ends.

    Raises:
        DataError: the header or a row does not fit; see `read_csv`.
    """
    if not rows:
        return []
    cells = rows[0][1]
    # longer rows are fine if the extra cells are empty: spreadsheets write such rows
    width = len(cells)
    ragged = [(n, c) for n, c in rows[1:] if len(c) < width or "".join(c[width:]).strip()]
    if (header_below := _header_below(rows)) is not None:
        raise DataError(
            f"{file} line 1 must name the columns, got {shown(cells[0])!r}; if line 1 is the "
            "header, name every column in it, and put double quotes around a field that holds "
            f"{_delimiter_name(delimiter)}; if line {header_below} is the header, "
            f"{file.filter_remedy(f'tail -n +{header_below}')}"
        )
    if ragged:
        raise _ragged_error(ragged, width, delimiter, file)
    if delimiter == "|" and any(
        _MARKDOWN_RULE.fullmatch("".join(cells)) for _, cells in rows[1:2]
    ):
        raise DataError(
            f"{file} must be delimited text, got a Markdown table; write it as CSV, without the "
            "line below the header and without bars at the ends"
        )
    header = _header(cells, [cells for _, cells in rows[1:]], file)
    kept = [(number, name) for number, name in enumerate(header) if name is not None]
    return [{name: cells[n] for n, name in kept} for _, cells in rows[1:]]


def _ragged_error(
    ragged: list[tuple[int, list[str]]], width: int, delimiter: str, file: DataFile
) -> DataError:
    line, cells = ragged[0]
    more = f" (and {len(ragged) - 1} more such rows)" if len(ragged) > 1 else ""
    return DataError(
        f"{file} line {line} must have {width} fields like the header, got "
        f"{len(cells)}{more}; put double quotes around a field that holds "
        f"{_delimiter_name(delimiter)}"
    )


def _delimiter_name(delimiter: str) -> str:
    return {"\t": "a tab", ";": "a semicolon", "|": "a bar"}.get(delimiter, "a comma")


def _header(names: list[str], rows: list[list[str]], file: DataFile) -> list[str | None]:
    """Return the names of the columns; None for a column with neither a name nor content.

    Raises:
        DataError: two columns have one name.
    """
    header: list[str | None] = []
    for number, name in enumerate(names):
        is_used = name.strip() or any("".join(row[number : number + 1]).strip() for row in rows)
        header.append((name.strip() or f"column_{number + 1}") if is_used else None)
    duplicates = [name for name, count in Counter(header).items() if name and count > 1]
    if duplicates:
        raise DataError(
            f"{file} must name each column once, got two called "
            f"{', '.join(map(shown, duplicates))}; rename one in line 1"
        )
    return header


# ---- Parquet and Arrow ---------------------------------------------------------------------


def read_parquet(file: DataFile) -> list[Record]:
    """Return the rows of a Parquet file.

    Raises:
        DataError: pyarrow is not installed, the file is damaged, or two columns have one name.
    """

    def read(stream: BinaryIO) -> Any:
        from pyarrow.parquet import ParquetFile

        return ParquetFile(stream).read()

    return _read_table(file, "a Parquet file", read)


def read_arrow(file: DataFile) -> list[Record]:
    """Return the rows of an Arrow file, or of a stream that `Dataset.save_to_disk` wrote.

    Raises:
        DataError: pyarrow is not installed, the file is damaged, or two columns have one name.
    """

    def read(stream: BinaryIO) -> Any:
        from pyarrow import ipc

        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        return (ipc.open_file if is_file else ipc.open_stream)(stream).read_all()

    return _read_table(file, "an Arrow file", read)


def _read_table(file: DataFile, kind: str, read: Callable[[BinaryIO], Any]) -> list[Record]:
    """Return the rows of a table that `read` makes of an open file.

    Args:
        kind: the kind of file, for the message "must be ...".
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(
            f"{file} needs the package pyarrow, which is not installed; type pip install pyarrow, "
            "or convert the file to .jsonl"
        ) from error
    try:
        with io.BytesIO(read_bytes(file)) if file.compression else file.path.open("rb") as stream:
            check_readable(file, stream.read(512))  # names another kind of file by its first bytes
            stream.seek(0)
            table = read(stream)
            duplicates = [n for n, count in Counter(table.column_names).items() if count > 1]
            if duplicates:
                raise DataError(
                    f"{file} must name each column once, got two called "
                    f"{', '.join(map(shown, duplicates))}; rename one"
                )
            return arrow_records(table)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{file} must be {kind}, got: {one_line(str(error), 80)}; download or write it again"
        ) from None


def arrow_records(table: Any) -> list[Record]:
    """Return the rows of an Arrow table.

    `readable_floats` converts floats, `drop_nulls` nested values, and `decode_bytes` bytes.

    Raises:
        DataError: a column holds dates or durations that Python cannot represent.
    """
    import pyarrow as pa

    names = [name for name in table.column_names if not _PANDAS_INDEX.fullmatch(name)]
    columns = []
    for name in names:
        column = table.column(name)
        try:
            cells = column.to_pylist()
        except OverflowError as error:
            raise DataError(
                f"column '{shown(name)}' must hold dates of the years 1 to 9999 and durations of "
                f"less than 10^9 days, got: {error}; correct it, or leave the column out"
            ) from None
        if pa.types.is_floating(column.type):
            cells = readable_floats(cells, column.type.bit_width)
        columns.append([decode_bytes(drop_nulls(cell)) for cell in cells])
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


READERS: dict[str, Callable[[DataFile], list[Record]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
