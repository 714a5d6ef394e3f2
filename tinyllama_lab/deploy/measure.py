"""Measures what was exported against the adapter as it was trained, on the same held-out rows."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.dataset.example import Example, clusters
from tinyllama_lab.core.evaluation.metrics.scores import text_scores
from tinyllama_lab.core.models.loading import model_folder, read_tokenizer
from tinyllama_lab.deploy.forms import Measured, Task
from tinyllama_lab.errors import DataChangedError, ModelError
from tinyllama_lab.metrics import MIB
from tinyllama_lab.report.analysis.statistics import compare
from tinyllama_lab.study.exports import BASE, TRAINED, ExportRow
from tinyllama_lab.study.trial import TrialFolder

_PROMPTS, _TOKENS = 50, 48  # answered by every form; tokens of an answer


@dataclass(frozen=True)
class Heldout:
    """The held-out rows of a trial, as the processes get them."""

    examples: list[Example]
    records: list[dict[str, Any]]


def heldout(trial: TrialFolder) -> Heldout:
    """Return the rows on which a trial was scored.

    Raises:
        DataChangedError: they are no longer the same tokens.
    """
    science: Science = part(Science, trial.read_config())
    tokenizer, positions = read_tokenizer(science.model)
    # the held-out rows do not depend on how many rows are trained on
    data = replace(science.data, n=1, balance_by=None, subset="nested")
    prepared = DataCache(tokenizer, positions).prepare(data, scored=science.eval.rows)
    result, _ = trial.read_result()
    recorded = result.data.get("eval_fingerprint") if result else None
    if recorded not in (None, prepared.facts["eval_fingerprint"]):
        raise DataChangedError(
            "an export must be measured on the rows that its trial was scored on, and they have "
            "changed since; run the study's command again"
        )
    records = [record_of(example, tokenizer) for example in prepared.heldout]
    return Heldout(prepared.heldout, records)


def record_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return an example as `Task.examples` have it."""
    return {
        "ids": list(example.ids),
        "loss_mask": list(example.loss_mask),
        "prompt_ids": list(example.prompt_ids),
        "prompt_text": str(tokenizer.decode(list(example.prompt_ids))),
    }


def measure_forms(
    trial: TrialFolder,
    exports: dict[str, list[Path]],
    device: str,
    say: Callable[[str], None],
) -> tuple[list[ExportRow], list[str]]:
    """Measure base, adapter and exports, one after the other, each in a process of its own.

    Returns the rows, and why exports that have none cannot be measured.

    Args:
        trial: the trial that was exported.
        exports: paths by form: a folder of a merged model, or a GGUF file with those added to it.
        device: of all forms but the GGUF files, which run on the CPU.
        say: called with the form that is measured next.

    Raises:
        ModelError: the base or the adapter cannot be measured.
    """
    rows = heldout(trial)
    plain = Task(TRAINED, str(trial.folder), [], device, _TOKENS, _PROMPTS, rows.records, None)
    say(TRAINED)
    trained = _run(plain)
    say(BASE)
    compared = replace(plain, answers=trained.answers)
    measured, problems = {BASE: _run(replace(compared, form=BASE)), TRAINED: trained}, []
    for form, paths in exports.items():
        say(form)
        try:
            measured[form] = _run(replace(compared, form=form, paths=list(map(str, paths))))
        except ModelError as error:  # the others are worth their minutes
            problems.append(str(error))
    sizes = _of_trial_mib(trial)
    sizes |= {form: sum(map(_size_mib, paths)) for form, paths in exports.items()}
    table = [_row(form, each, trained, rows, sizes[form]) for form, each in measured.items()]
    return table, problems


def _of_trial_mib(trial: TrialFolder) -> dict[str, float]:
    """Return MiB of the files of a base, and of what a trial made of it."""
    science: Science = part(Science, trial.read_config())
    base_mib, own_mib = _size_mib(model_folder(science.model)), _size_mib(trial.adapter_dir)
    return {BASE: base_mib, TRAINED: own_mib if science.lora.is_full else base_mib + own_mib}


def _run(task: Task) -> Measured:
    """Measure a form in a process of its own.

    Raises:
        ModelError: the process failed; its last line says why.
    """
    with tempfile.TemporaryDirectory() as name:
        request, result = Path(name, "task.json"), Path(name, "measured.json")
        request.write_text(json.dumps(asdict(task)), encoding="utf-8")
        command = [sys.executable, "-m", "tinyllama_lab.deploy.probe", str(request), str(result)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
            raise ModelError(f"{task.form} cannot be measured: {last.removeprefix('error: ')}")
        return Measured(**json.loads(result.read_text(encoding="utf-8")))


def _row(
    form: str, measured: Measured, trained: Measured, rows: Heldout, file_mib: float
) -> ExportRow:
    examples = rows.examples
    tokens = np.array([example.labels for example in examples], dtype=np.float64)
    losses = np.array(measured.losses)
    difference = low = high = None
    if measured is not trained and len(set(clusters(examples))) > 1:
        ids = np.array(clusters(examples), dtype=np.int64)
        estimate = compare((losses - np.array(trained.losses))[None], tokens, clusters=ids)
        difference, (low, high) = estimate.difference, estimate.interval()
    answered = examples[: len(measured.texts)]
    references, intents = [e.reference for e in answered], [e.intent for e in answered]
    return ExportRow(
        form,
        measured.dtype,
        float(losses.sum() / tokens.sum()),
        difference,
        low,
        high,
        text_scores(measured.texts, references, intents),
        measured.same_tokens,
        measured.decode_tokens_per_s,
        measured.first_token_ms,
        measured.resident_mib,
        file_mib,
        measured.device,
    )


def _size_mib(path: Path) -> float:
    """Return the size of a file, or of the weights in a folder."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    return sum(file.stat().st_size for file in files) / MIB
