"""`python -m tinyllama_lab.report study=<name>`: the table of a study that was run."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from tinyllama_lab.errors import ConfigError, StudyError, user_errors
from tinyllama_lab.report.table import print_table, read_study, write_table
from tinyllama_lab.study import Study


def main(arguments: list[str]) -> None:
    """Print and rewrite the table; `sweeps_dir=<folder>` where studies are kept elsewhere."""
    settings = {"study": "default", "sweeps_dir": "sweeps"}
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if name not in settings or not sign:
            raise ConfigError(
                [f"a report takes study=<name> and sweeps_dir=<folder>, got {argument!r}"]
            )
        settings[name] = value
    root = Path(settings["sweeps_dir"])
    study = Study(root, settings["study"])
    rows = read_study(study)
    if not rows:
        there = sorted(p.parent.name for p in root.glob("*/trials")) or ["none yet"]
        raise StudyError(f"{study.folder} holds no trials; studies here: {', '.join(there)}")
    write_table(study, rows)
    print_table(rows, Console())
    print(f"written: {study.table_file} and {study.metrics_file}")


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
