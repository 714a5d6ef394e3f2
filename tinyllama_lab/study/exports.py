"""The files that a trial is exported to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Exports:
    """The exports in a folder, which is a trial's `deploy_dir`."""

    folder: Path

    @property
    def merged_dir(self) -> Path:
        """The base with the adapter in its weights, as transformers saves a model."""
        return self.folder / "merged"

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
