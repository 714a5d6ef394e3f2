"""Crash-safe checkpoints of a trial that is being trained, and exact resume.

A checkpoint appears by one rename, after every file of it, and a manifest with their SHA-256,
is on the disk. Loading takes the newest whose manifest fits, else the one before. Only
safetensors and JSON are written or read, never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tinyllama_lab.study.files import atomic_folder

KEEP = 2
_FILES = ("state.safetensors", "state.json")


@dataclass
class Checkpoint:
    """The state of training after `step` optimizer steps."""

    step: int
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Commit a checkpoint and drop all but the newest two.

    A whole one of the same step stays: it holds the same state, and replacing a folder is not
    atomic, so that a kill in between would leave none.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    if _read(target) is not None:
        return
    # safetensors stores contiguous tensors only
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
    facts = {"step": checkpoint.step, **checkpoint.facts}
    with atomic_folder(target) as temporary:
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(facts), encoding="utf-8")
        manifest = {name: _sha256(temporary / name) for name in _FILES}
        (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    # only now: until the new checkpoint is complete, a kill must find the older ones
    _prune(folder)


def load(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest whole checkpoint, and the names of damaged ones that were skipped."""
    damaged: list[str] = []
    # step numbers are padded with zeros, so names sort by step
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        checkpoint = _read(candidate)
        if checkpoint is not None:
            return checkpoint, damaged
        damaged.append(candidate.name)
    return None, damaged


def discard(folder: Path, after: int) -> None:
    """Delete checkpoints of later steps, which would count among the newest two that are kept."""
    for candidate in folder.glob("step-*"):
        if candidate.name > f"step-{after:08d}":
            shutil.rmtree(candidate, ignore_errors=True)


def _read(folder: Path) -> Checkpoint | None:
    """Return the checkpoint in a folder, or None if it is damaged or missing."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if any(_sha256(folder / name) != manifest[name] for name in _FILES):
            return None
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "state.safetensors")
        if not all(torch.isfinite(values).all() for values in tensors.values()):
            return None
        return Checkpoint(facts.pop("step"), tensors, facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged in some other way: treated like a wrong hash


def _prune(folder: Path) -> None:
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
