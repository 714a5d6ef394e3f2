"""What a search left for the report."""

from __future__ import annotations

import json

from tinyllama_lab.study import Study


def read_search(study: Study) -> list[str]:
    """Its outcome in words; nothing where there was none, or the file is damaged."""
    try:
        record = json.loads(study.search_file.read_text(encoding="utf-8"))
        lines = record["lines"]
        return [str(line) for line in lines] if isinstance(lines, list) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
