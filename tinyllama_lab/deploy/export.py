"""Exports the adapter of a trial, and measures every export again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tinyllama_lab.deploy.gguf_export import write_gguf
from tinyllama_lab.deploy.llama_cpp import check_installed
from tinyllama_lab.deploy.measure import Row, measure_forms
from tinyllama_lab.deploy.merge import merge
from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.exports import Exports
from tinyllama_lab.study.files import atomic_folder, publish, write_atomic
from tinyllama_lab.study.trial import TrialFolder

MERGED = "merged"
Say = Callable[[str], None]


def export_merged(trial: TrialFolder, target: Path, into: str, force: bool) -> None:
    """Write the merged model of a trial into a folder.

    Raises:
        StudyError: the folder exists and `force` is false.
    """
    _check_free(target, force)
    with atomic_folder(target) as folder:
        merge(trial, folder, into)


def export_gguf(model: Path, target: Path, kind: str, force: bool) -> None:
    """Write a merged model to a GGUF file.

    Raises:
        StudyError: the file exists and `force` is false.
    """
    _check_free(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder, target.name)
        write_gguf(model, written, kind)
        publish(written, target)


def _check_free(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise StudyError(
            f"an export must not replace another one, and {target} exists; "
            "set force=true, or to=<another folder>"
        )


def deploy(
    trial: TrialFolder, kinds: Sequence[str], into: str, device: str, force: bool, say: Say
) -> list[Row]:
    """Merge, write the GGUF files, measure all of them, and keep the numbers with the trial.

    Exports that are there already are measured again, and written again if `force` is true.

    Raises:
        ModelError: llama.cpp is not installed, or a form cannot be measured.
    """
    if kinds:  # before minutes of work
        check_installed()
    exports = Exports(trial.deploy_dir)
    merged = exports.merged_dir
    if force or not merged.exists():
        say("merging")
        export_merged(trial, merged, into, force)
    files = {kind: exports.gguf_file(kind) for kind in kinds}
    for kind, file in files.items():
        if force or not file.exists():
            say(f"writing {file.name}")
            export_gguf(merged, file, kind, force)
    forms = {MERGED: merged, **files}
    rows = measure_forms(trial, forms, device, lambda form: say(f"measuring {form}"))
    record = [asdict(row) for row in rows]
    write_atomic(exports.measured_file, json.dumps(record, indent=2) + "\n")
    return rows


def write_modelfile(exports: Exports, kind: str) -> Path:
    """Write what `ollama create` reads, beside the GGUF file, and return its path.

    Ollama takes the chat template from the file itself.
    """
    lines = [f"FROM ./{exports.gguf_file(kind).name}", "PARAMETER temperature 0"]
    write_atomic(exports.modelfile, "\n".join(lines) + "\n")
    return exports.modelfile
