"""Records as users bring them, and what becomes of their columns and rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.test_rows import config
from tinyllama_lab.data.formats.detection import recognise
from tinyllama_lab.data.rows import RawRow, to_rows

Records = list[dict[str, Any]]


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def columns(records: Records, **changes: Any) -> dict[str, str]:
    """Return the resolved columns of a data set, without those that it does not have."""
    data, _ = recognise(records, config(**changes))
    return {key: name for key, name in vars(data.columns).items() if name}


def rows_of(records: Records, **changes: Any) -> tuple[list[RawRow], dict[str, int]]:
    rows, dropped = to_rows(records, config(**changes))
    return rows, dropped.facts


def written(folder: Path, records: Records, end: str = "jsonl") -> Path:
    path = folder / f"rows.{end}"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
