"""What a check found: a line with its level and, where something is to be done, the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is; only a problem stops a command."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line."""

    level: Level
    topic: str
    text: str


def ok(topic: str, text: str) -> Finding:
    """Return a finding of something that is as it should be."""
    return Finding(Level.OK, topic, text)


def warning(topic: str, text: str) -> Finding:
    """Return a finding that makes something slower, or impossible that few need."""
    return Finding(Level.WARNING, topic, text)


def problem(topic: str, text: str) -> Finding:
    """Return a finding that stops a command."""
    return Finding(Level.PROBLEM, topic, text)
