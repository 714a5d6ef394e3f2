"""Writes commands for users: quotes values for Hydra's parser, then words for the shell."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from tinyllama_lab.study.study import StudyFolder

# The defaults of `study` and `sweeps_dir` in conf/config.yaml. They are repeated here because a
# report reads no YAML; a test compares them with the file.
STUDY, SWEEPS_DIR = "default", "sweeps"
_WORDS = ("null", "true", "false", "nan", "inf")  # Hydra does not read them as strings
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_QUOTE_OR_END = re.compile(r'(\\*)("|\Z)')


def quoted(text: str) -> str:
    """Quote a string so that Hydra reads exactly this text, whatever characters it contains."""
    # Hydra halves backslashes only before `${` and quotes, so only those are doubled
    text = _INTERPOLATION.sub(lambda match: 2 * match[1] + r"\${", text)
    text = _QUOTE_OR_END.sub(lambda match: 2 * match[1] + (r"\"" if match[2] else ""), text)
    return f'"{text}"'


def unquoted(text: str) -> str:
    """Return the text that `quoted` was given; a text without quotes around it is unchanged."""
    mark = text[:1]
    if len(text) < 2 or mark not in ("'", '"') or not text.endswith(mark):
        return text
    # Hydra halves the backslashes before these alone
    halved = re.compile(rf"(\\*)({mark}|\$\{{|\Z)")
    return halved.sub(lambda match: len(match[1]) // 2 * "\\" + match[2], text[1:-1])


def setting(key: str, text: str) -> str:
    """Return `key=text`, quoted for Hydra unless the text is only letters, digits and `./_-`."""
    # a leading digit or dash is quoted too: Hydra would read a number
    is_plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", text) and text.lower() not in _WORDS
    return f"{key}={text if is_plain else quoted(text)}"


def typed(key: str, text: str) -> str:
    """Return what a user types in a shell to set `key` to exactly this text."""
    return shlex.quote(setting(key, text))


def sweep_command(words: Iterable[str]) -> str:
    """Return `python -m tinyllama_lab` with settings, quoted for a shell."""
    return shlex.join(["python", "-m", "tinyllama_lab", *words])


def report_command(study: StudyFolder) -> str:
    """Return the command that writes a study's report again, quoted for a shell."""
    return sweep_command(["report", *study_settings(study)])


def chat_command(study: StudyFolder) -> str:
    """Return the command that talks to the recommended adapter, quoted for a shell."""
    settings = study_settings(study)
    return shlex.join(["python", "-m", "tinyllama_lab.deploy", "chat", *settings])


def study_settings(study: StudyFolder) -> list[str]:
    """Return the settings that select a study; its root only if that is not the default.

    The root is relative to the working folder, so that reports hold no path of this machine.
    """
    root = _relative_root(study)
    return [f"study={study.name}", *([] if root == SWEEPS_DIR else [setting("sweeps_dir", root)])]


def _relative_root(study: StudyFolder) -> str:
    return str(Path(os.path.relpath(study.root)))
