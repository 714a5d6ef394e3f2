"""Exports the adapter of a trial, and measures every export again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tinyllama_lab.deploy.gguf_export import write_gguf
from tinyllama_lab.deploy.llama_cpp import check_installed
from tinyllama_lab.deploy.measure import measure_forms
from tinyllama_lab.deploy.merge import merge
from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.exports import MERGED, ExportRow, Exports
from tinyllama_lab.study.files import atomic_folder, publish, write_atomic
from tinyllama_lab.study.trial import TrialFolder

Say = Callable[[str], None]


def export_merged(trial: TrialFolder, target: Path, into: str, force: bool) -> None:
    """Write the merged model of a trial into a folder.

    Raises:
        StudyError: the folder exists and `force` is false.
    """
    _check_free(target, force)
    with atomic_folder(target) as folder:
        merge(trial, folder, into)


def export_gguf(trial: TrialFolder, kinds: Sequence[str], force: bool, say: Say) -> list[Path]:
    """Write GGUF files of a trial with a Modelfile for the last one, and return their paths.

    The trial is merged first, if it is not yet.

    Raises:
        StudyError: one of the files exists and `force` is false.
    """
    exports = Exports(trial.deploy_dir)
    for kind in kinds:
        _check_free(exports.gguf_file(kind), force)
    if not exports.merged_dir.exists():
        say("merging")
        export_merged(trial, exports.merged_dir, "dequantized", force)
    for kind in kinds:
        say(f"writing {exports.gguf_file(kind).name}")
        with tempfile.TemporaryDirectory(dir=exports.folder) as folder:
            written = Path(folder, exports.gguf_file(kind).name)
            write_gguf(exports.merged_dir, written, kind)
            publish(written, exports.gguf_file(kind))
    lines = [f"FROM ./{exports.gguf_file(kinds[-1]).name}", "PARAMETER temperature 0"]
    write_atomic(exports.modelfile, "\n".join(lines) + "\n")
    return [*map(exports.gguf_file, kinds), exports.modelfile]


def _check_free(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise StudyError(
            f"an export must not replace another one, and {target} exists; set force=true"
        )


def deploy(
    trial: TrialFolder, kinds: Sequence[str], device: str, force: bool, say: Say
) -> list[ExportRow]:
    """Merge, write the GGUF files, measure all of them, and keep the numbers with the trial.

    Exports that are there already are measured again, and written again if `force` is true.

    Raises:
        ModelError: llama.cpp is not installed, or a form cannot be measured.
    """
    if kinds:  # before minutes of work
        check_installed()
    exports = Exports(trial.deploy_dir)
    if force or not exports.merged_dir.exists():
        say("merging")
        export_merged(trial, exports.merged_dir, "dequantized", force)
    files = {kind: exports.gguf_file(kind) for kind in kinds}
    if missing := [kind for kind, file in files.items() if force or not file.exists()]:
        export_gguf(trial, missing, force, say)
    forms = {MERGED: exports.merged_dir, **files}
    rows = measure_forms(trial, forms, device, lambda form: say(f"measuring {form}"))
    exports.write_measured(rows)
    return rows
