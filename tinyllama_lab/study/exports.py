"""The files that a trial is exported to, and the record of how they compare."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tinyllama_lab.study.files import write_atomic

# forms of a model; all others are types of GGUF files with a whole model
BASE, TRAINED = "base", "adapter"
MERGED, ORIGINAL = "merged", "original"  # into weights of training, or those before quantization
_MODELS_FIRST = (BASE, TRAINED, MERGED, ORIGINAL)
LORA = "lora"  # an adapter alone in a GGUF file, beside that of its base


@dataclass(frozen=True)
class ExportRow:
    """A form of a model beside the adapter as trained.

    `low` and `high` are the 95 % interval of `difference` over held-out rows.
    """

    form: str
    dtype: str
    loss: float  # nats per supervised token
    difference: float | None  # of the losses, this form minus the adapter as trained
    low: float | None
    high: float | None
    scores: dict[str, float]  # of its answers, by metric name
    same_tokens: float | None  # share of the adapter's tokens that it would choose too
    decode_tokens_per_s: float
    first_token_ms: float
    resident_mib: float
    file_mib: float
    device: str = "cpu"  # on which speed and memory were measured


@dataclass(frozen=True)
class Exports:
    """The exports in a folder: the `deploy_dir` of a trial, or of a study for shared ones."""

    folder: Path

    @property
    def merged_dir(self) -> Path:
        """The base with the adapter in its weights, as transformers saves a model."""
        return self.folder / "merged"

    @property
    def original_dir(self) -> Path:
        """The same with the weights that a quantized base had before quantization."""
        return self.folder / "merged-original"

    @property
    def lora_file(self) -> Path:
        """The adapter alone, for llama.cpp."""
        return self.folder / "adapter.gguf"

    @property
    def measured_file(self) -> Path:
        """How the exports compare with the adapter as trained."""
        return self.folder / "measured.json"

    @property
    def modelfile(self) -> Path:
        """What Ollama makes a model of."""
        return self.folder / "Modelfile"

    def gguf_file(self, kind: str) -> Path:
        """Return the GGUF file with weights of a type, such as `q4_0`."""
        return self.folder / f"model-{kind}.gguf"

    def base_file(self, key: str, kind: str) -> Path:
        """Return the GGUF file of a base without adapter; `key` tells several bases apart."""
        return self.folder / f"base-{key}-{kind}.gguf"

    def add_measured(self, rows: Sequence[ExportRow]) -> list[ExportRow]:
        """Record how exports compare, beside others that are still there, and return all rows.

        Models come first, then files, the largest first.
        """
        forms = {row.form for row in rows}
        others = [row for row in self.read_measured()[0] if row.form not in forms]
        every = [*rows, *(row for row in others if self._path(row.form).exists())]
        by_form = {row.form: row for row in every}
        models = [by_form.pop(form) for form in _MODELS_FIRST if form in by_form]
        files = sorted(by_form.values(), key=lambda row: -row.file_mib)
        self._write([*models, *files])
        return [*models, *files]

    def forget_measured(self, forms: Collection[str]) -> None:
        """Remove the rows of exports that are written again."""
        rows, _ = self.read_measured()
        if any(row.form in forms for row in rows):
            self._write([row for row in rows if row.form not in forms])

    def _write(self, rows: Sequence[ExportRow]) -> None:
        record = [asdict(row) for row in rows]
        write_atomic(self.measured_file, json.dumps(record, indent=2) + "\n")

    def _path(self, form: str) -> Path:
        """Return where a form is exported to; the folder for what needs no export."""
        folders = {BASE: self.folder, TRAINED: self.folder, LORA: self.lora_file}
        folders |= {MERGED: self.merged_dir, ORIGINAL: self.original_dir}
        return folders.get(form) or self.gguf_file(form)

    def read_measured(self) -> tuple[list[ExportRow], str | None]:
        """Return the recorded rows, or none and why they cannot be read (None if not written)."""
        try:
            text = self.measured_file.read_text(encoding="utf-8")
            return [ExportRow(**row) for row in json.loads(text)], None
        except FileNotFoundError:
            return [], None
        except (OSError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            return [], f"{self.measured_file} is damaged ({reason}); deploy the trial again"
