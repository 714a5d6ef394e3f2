"""Exports the adapter of a trial, and measures every export again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import LlamaFileType
from transformers import AutoConfig

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.models.loading import TRUSTED_FILES, model_folder, read_tokenizer
from tinyllama_lab.deploy.gguf_export import (
    FILE_TYPES,
    check_architecture,
    weights_by_type,
    write_gguf,
)
from tinyllama_lab.deploy.gguf_lora import check_adapter, write_lora
from tinyllama_lab.deploy.llama_cpp import check_installed, quantize_file
from tinyllama_lab.deploy.measure import measure_forms
from tinyllama_lab.deploy.merge import merge, save_base
from tinyllama_lab.deploy.selection import Selection
from tinyllama_lab.deploy.trained import prompt_format
from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.exports import LORA, MERGED, ORIGINAL, ExportRow, Exports
from tinyllama_lab.study.files import atomic_folder, publish, write_atomic
from tinyllama_lab.study.trial import TrialFolder, digest

# written from the file in float16 by llama.cpp itself, since the package `gguf` cannot
QUANTIZED = {"q4_k_m": LlamaFileType.MOSTLY_Q4_K_M}
MODEL_KINDS = (*FILE_TYPES, *QUANTIZED)  # of files with a whole model
KINDS = (*MODEL_KINDS, LORA)
_OF_MODELS = (".safetensors", ".json", ".jinja", ".txt", ".model")  # suffixes of files
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What is to be written."""

    kinds: Sequence[str]  # of GGUF files, of `KINDS`
    base_kind: str  # of the base's file beside an adapter alone, of `MODEL_KINDS`
    force: bool  # replaces what is there


def export_merged(trial: TrialFolder, target: Path, into: str, force: bool) -> None:
    """Write the merged model of a trial into a folder.

    Raises:
        StudyError: it cannot be made, holds something else, or exists and `force` is false.
    """
    target = target.resolve()  # `.` has no name to rename to
    _check_folder(target)
    _check_free(target, force)
    with atomic_folder(target) as folder:
        merge(trial, folder, into)


def export_gguf(selection: Selection, wanted: Wanted, say: Say) -> list[Path]:
    """Write GGUF files of a trial with a Modelfile for the last one, and return their paths.

    The trial is merged first, if it is not yet.

    Raises:
        ModelError: a file cannot be written.
        StudyError: one of the files exists and `force` is false.
    """
    trial = selection.trial.row.trial
    exports = Exports(trial.deploy_dir)
    check_kinds(trial, wanted)
    for kind in wanted.kinds:
        _check_free(_file(exports, kind), wanted.force)
    models = [kind for kind in wanted.kinds if kind != LORA]
    if models and (wanted.force or not exports.merged_dir.exists()):
        say("merging")
        export_merged(trial, exports.merged_dir, "dequantized", wanted.force)
    exports.forget_measured(wanted.kinds)
    _write_files(selection, wanted, say)
    base = [_base_file(selection, wanted.base_kind)] if LORA in wanted.kinds else []
    files = [_file(exports, kind) for kind in wanted.kinds]
    return [*files, *base, _write_modelfile(selection, wanted)]


def _write_files(selection: Selection, wanted: Wanted, say: Say) -> None:
    """Write the GGUF files of a trial that is merged."""
    exports = Exports(selection.trial.row.trial.deploy_dir)
    for kind in wanted.kinds:
        if kind == LORA:
            _export_lora(selection, wanted, say)
            continue
        say(f"writing {exports.gguf_file(kind).name}")
        _write_model(exports.merged_dir, exports.gguf_file(kind), kind, say)


def _write_modelfile(selection: Selection, wanted: Wanted) -> Path:
    """Write what Ollama makes a model of, from the last of the files."""
    exports = Exports(selection.trial.row.trial.deploy_dir)
    last = _file(exports, wanted.kinds[-1])
    lines = [f"FROM ./{last.name}"]
    if last == exports.lora_file:
        base = _base_file(selection, wanted.base_kind)
        lines = [f"FROM {base.resolve()}", f"ADAPTER ./{last.name}"]
    write_atomic(exports.modelfile, "\n".join([*lines, "PARAMETER temperature 0"]) + "\n")
    return exports.modelfile


def check_kinds(trial: TrialFolder, wanted: Wanted) -> None:
    """Refuse, before minutes of work, what cannot be written.

    Raises:
        ModelError: the model or the adapter has no such file, or llama.cpp is not installed.
    """
    if not wanted.kinds:
        return
    science: Science = part(Science, trial.read_config())
    check_architecture(AutoConfig.from_pretrained(model_folder(science.model), **TRUSTED_FILES))
    if LORA in wanted.kinds:
        check_adapter(trial.adapter_dir)
    kinds = [*wanted.kinds, *([wanted.base_kind] if LORA in wanted.kinds else [])]
    if quantized := [kind for kind in kinds if kind in QUANTIZED]:
        check_installed(f"write {quantized[0]}", f"choose of {', '.join(FILE_TYPES)}")


def _file(exports: Exports, kind: str) -> Path:
    return exports.lora_file if kind == LORA else exports.gguf_file(kind)


def _write_model(model: Path, target: Path, kind: str, say: Say) -> None:
    """Write the model of a folder to a GGUF file of a kind."""
    with _published(target) as written:
        if kind in FILE_TYPES:
            write_gguf(model, written, kind)
            return
        exact = written.with_name("exact.gguf")
        write_gguf(model, exact, "f16")
        quantize_file(exact, written, QUANTIZED[kind])
        # llama.cpp takes other types where rows are no multiple of a block
        say(f"{target.name}: {weights_by_type(written)}")


def _export_lora(selection: Selection, wanted: Wanted, say: Say) -> None:
    """Write the adapter alone, and its base if that is not there yet."""
    trial = selection.trial.row.trial
    science: Science = part(Science, trial.read_config())
    kind = wanted.base_kind
    target, base = Exports(trial.deploy_dir).lora_file, _base_file(selection, kind)
    if wanted.force or not base.exists():
        say(f"writing {base.name}")
        base.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base.parent) as folder:
            save_base(trial, Path(folder))
            _write_model(Path(folder), base, kind, say)
    say(f"writing {target.name}")
    config = AutoConfig.from_pretrained(model_folder(science.model), **TRUSTED_FILES)
    with _published(target) as written:
        write_lora(trial.adapter_dir, config, written)


def _base_file(selection: Selection, kind: str) -> Path:
    """Return the file of a trial's base, which trials with the same weights and prompts share."""
    trial = selection.trial.row.trial
    science: Science = part(Science, trial.read_config())
    tokenizer, _ = read_tokenizer(science.model)
    template = prompt_format(trial, tokenizer).template()
    model, quant = science.model, science.quant
    key = digest([model.source, model.repo, model.identity, quant.kind, quant.double, template])
    return Exports(selection.study.deploy_dir).base_file(key, kind)


@contextmanager
def _published(target: Path) -> Iterator[Path]:
    """Give a path to write to, and rename it to `target` when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder, target.name)
        yield written
        publish(written, target)


def _check_free(target: Path, force: bool) -> None:
    """Check that nothing is replaced but an earlier export, and that only with `force`.

    Raises:
        StudyError: it would be.
    """
    if not target.exists():
        return
    # a user may have typed the name of any folder
    if target in (Path.cwd(), *Path.cwd().parents):
        raise StudyError(f"an export must have a folder of its own, got {target}; set to=my_model")
    if target.is_dir() and (other := next(_others(target), None)):
        raise StudyError(
            f"an export must replace nothing but an earlier export, and {target} holds {other}; "
            "choose another folder"
        )
    if not force:
        raise StudyError(
            f"an export must not replace another one, and {target} exists; set force=true"
        )


def _check_folder(target: Path) -> None:
    """Refuse, before minutes of work, a folder that cannot be made.

    Raises:
        StudyError: it cannot.
    """
    if target.exists() and not target.is_dir():
        raise StudyError(
            f"a merged model must be a folder, got the file {target}; set another to="
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent):
            pass
    except OSError as error:
        raise StudyError(
            f"a merged model needs a folder that can be written, got {target} ({error.strerror}); "
            "set another to="
        ) from None


def _others(folder: Path) -> Iterator[str]:
    """Yield what is in a folder beside the files of a saved model."""
    names = [path.name for path in folder.iterdir()]
    if names and "config.json" not in names:
        yield "no model"
    yield from (p.name for p in folder.iterdir() if p.is_dir() or p.suffix not in _OF_MODELS)


def deploy(
    selection: Selection, wanted: Wanted, device: str, say: Say
) -> tuple[list[ExportRow], list[str]]:
    """Merge, write the GGUF files, measure all of them, and keep the numbers with the trial.

    Returns the numbers, and why exports that have none cannot be measured.

    Exports that are there already are measured again, and written again if `force` is true. A
    quantized base is merged into the weights of training, and into those before quantization.

    Raises:
        ModelError: llama.cpp is not installed, or a form cannot be written.
    """
    trial = selection.trial.row.trial
    exports = Exports(trial.deploy_dir)
    if wanted.kinds:  # before minutes of work
        check_installed("measure GGUF files", "set types= to measure no such file")
    check_kinds(trial, wanted)
    forms = {MERGED: [exports.merged_dir]}
    if part(Science, trial.read_config()).quant.kind != "none":
        forms[ORIGINAL] = [exports.original_dir]
    for form, (folder,) in forms.items():
        if wanted.force or not folder.exists():
            say("merging" if form == MERGED else "merging into the original weights")
            into = "dequantized" if form == MERGED else "original"
            export_merged(trial, folder, into, wanted.force)
    forms |= {kind: [_file(exports, kind)] for kind in wanted.kinds}
    if LORA in wanted.kinds:
        forms[LORA].insert(0, _base_file(selection, wanted.base_kind))
    missing = [k for k in wanted.kinds if wanted.force or not all(f.exists() for f in forms[k])]
    if missing:
        _write_files(selection, replace(wanted, kinds=missing), say)
    if wanted.kinds:
        _write_modelfile(selection, wanted)
    rows, problems = measure_forms(trial, forms, device, lambda form: say(f"measuring {form}"))
    return exports.add_measured(rows), problems
