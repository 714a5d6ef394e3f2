"""The files that a trial is exported to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
