"""The kinds of data source that `data.source` may name; driver and worker read them here.

A new kind of local source needs one more entry, a module that reads it, and a file in `conf/data`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceKind:
    """Where the records of a kind of source come from, and which settings say so.

    Args:
        settings: those of `repo`, `config`, `revision`, `split`, `eval_split`, `path` and
            `eval_path` that it reads. The first one is required, all others are refused.
        required: what the first setting must name, for messages.
        example: a value of the first setting, for messages.
        package_file: a file in `data/` that is read instead of `data.path`.
        reader: module of `data/reading` whose `read_path` reads a path; empty for data files,
            which are read by their suffix.
        is_remote: the worker downloads the records, so the driver cannot check them.
        licence: of the records, where this project knows it; as the hub names licences.
        languages: of the records, where this project knows them; as the hub names languages.
    """

    settings: tuple[str, ...] = ()
    required: str = ""
    example: str = ""
    package_file: str = ""
    reader: str = ""
    is_remote: bool = False
    licence: str = ""
    languages: tuple[str, ...] = ()

    @property
    def has_path(self) -> bool:
        """Whether the user says in `data.path` where the records are."""
        return "path" in self.settings


FILE_OPTIONS = {"model": "local", "data": "file"}  # the options for files on disk
SOURCES = {
    "travel": SourceKind(
        package_file="travel/travel.jsonl", licence="apache-2.0", languages=("en",)
    ),
    "hub": SourceKind(
        ("repo", "config", "revision", "split", "eval_split"),
        required="a hub repository",
        example="owner/name",
        is_remote=True,
    ),
    "file": SourceKind(("path", "eval_path"), required="a file", example="my.jsonl"),
}
