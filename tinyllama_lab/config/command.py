"""How commands are written: a value for Hydra's parser, then a word for the shell."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from tinyllama_lab.study.study import Study

SWEEPS_DIR = "sweeps"  # what `sweeps_dir` is in conf/config.yaml: a command need not say it
_WORDS = ("null", "true", "false", "nan", "inf")  # Hydra reads them as values
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_QUOTE_OR_END = re.compile(r'(\\*)("|\Z)')


def quoted(text: str) -> str:
    """A string that Hydra reads as exactly this text, whatever stands in it."""
    text = _INTERPOLATION.sub(lambda found: 2 * found[1] + r"\${", text)
    text = _QUOTE_OR_END.sub(lambda found: 2 * found[1] + (r"\"" if found[2] else ""), text)
    return f'"{text}"'


def setting(key: str, text: str) -> str:
    """`key=text`, with quotes for Hydra where the text is more than letters, digits and `./_-`."""
    is_plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", text) and text.lower() not in _WORDS
    return f"{key}={text if is_plain else quoted(text)}"


def typed(key: str, text: str) -> str:
    """What one types in a shell so that a setting is exactly this text."""
    return shlex.quote(setting(key, text))


def sweep_command(words: Iterable[str]) -> str:
    """`python -m tinyllama_lab` with settings, ready for a shell."""
    return shlex.join(["python", "-m", "tinyllama_lab", *words])


def report_command(study: Study) -> str:
    """The command that writes a study's report again, ready for a shell."""
    root = _relative_root(study)
    place = [] if root == SWEEPS_DIR else [f"sweeps_dir={root}"]
    words = ["python", "-m", "tinyllama_lab.report", f"study={study.name}", *place]
    return shlex.join(words)


def study_settings(study: Study) -> list[str]:
    """The study, and its root where that is not the usual one; never a path of this machine."""
    root = _relative_root(study)
    return [f"study={study.name}", *([] if root == SWEEPS_DIR else [setting("sweeps_dir", root)])]


def _relative_root(study: Study) -> str:
    return str(Path(os.path.relpath(study.root)))
