"""The table of source kinds, and the recipe that adds one."""

from __future__ import annotations

import re
import sqlite3
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.data.test_rows import config
from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.config.sources import SOURCES
from tinyllama_lab.data.sources import content_digest, load_held_out, load_rows, local_path
from tinyllama_lab.errors import DataError

RECIPE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture
def sqlite_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of the recipe, made of the recipe's own code."""
    section = RECIPE.partition("## A data source kind")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)   ```", section, re.S)
    (entry,) = re.findall(r'\+    "sqlite": (SourceKind\(.*\)),\n', section)
    module = ModuleType("tinyllama_lab.data.reading.sqlite")
    exec(re.sub("^   ", "", code, flags=re.M), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(SOURCES, "sqlite", eval(entry, {"SourceKind": type(SOURCES["file"])}))


def test_the_kind_of_the_recipe_reads_rows_and_names_a_damaged_file(
    tmp_path: Path, sqlite_kind: None
) -> None:
    path = tmp_path / "my.db"
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE rows (prompt, response)")
        connection.executemany("INSERT INTO rows VALUES (?, ?)", [("q", "r"), ("s", "t")])
    connection.close()
    data = replace(config(), source="sqlite", path=str(path))
    rows = [{"prompt": "q", "response": "r"}, {"prompt": "s", "response": "t"}]
    assert load_rows(data) == rows and load_held_out(data) is None
    identity = content_digest(data)
    path.write_bytes(b"no database" * 100)
    assert content_digest(data) != identity
    with pytest.raises(DataError, match=r"data\.path must name an SQLite database.*my\.db"):
        load_rows(data)
    assert list(replace(data, path=None).problems()) == [
        "data.path must name an SQLite database, got null; set data.path=my.db"
    ]


@pytest.mark.parametrize("name", SOURCES)
def test_a_kind_reads_settings_that_there_are_and_says_which_one_it_needs(name: str) -> None:
    kind = SOURCES[name]
    assert set(kind.settings) <= {item.name for item in fields(DataConfig)}
    assert bool(kind.settings) == bool(kind.required) == bool(kind.example)
    assert kind.is_remote or kind.has_path or local_path(config(name)).is_file()
