"""Runs and quantizes GGUF files in llama.cpp, on the CPU, through its Python binding.

Nothing here imports torch, so that a process that measures a file has llama.cpp's memory alone.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllama_lab.errors import ModelError


def binding() -> Any:
    """Return the binding's module.

    Raises:
        ModelError: the package is not installed.
    """
    check_installed("run GGUF files", "install it")
    return _silent_binding()[0]


@cache
def _silent_binding() -> tuple[Any, Any]:
    """Return the binding's module without its log, and the callback that has to stay alive."""
    import llama_cpp

    callback = llama_cpp.llama_log_callback(_ignore)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp, callback


def check_installed(purpose: str, instead: str) -> None:
    """Check that the binding is installed, without importing it.

    Args:
        purpose: what it is needed for.
        instead: what to type without it.

    Raises:
        ModelError: it is not installed.
    """
    if find_spec("llama_cpp") is None:
        raise ModelError(
            f"llama.cpp must be installed to {purpose}, and is not; type: "
            f"pip install llama-cpp-python (it is compiled, in some minutes), or {instead}"
        )


def quantize_file(source: Path, target: Path, file_type: int) -> None:
    """Write a GGUF file in float16 again, in a type that only llama.cpp's own quantizer knows.

    Args:
        source: the file in float16.
        target: the file to write.
        file_type: llama.cpp's number of the type, `LlamaFileType` in the package `gguf`.

    Raises:
        ModelError: llama.cpp is missing, or fails.
    """
    lib = binding()
    settings = lib.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = file_type, os.cpu_count()
    if lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), settings):
        raise ModelError(f"llama.cpp cannot quantize {source}; choose other types=")


class GgufModel:
    """A GGUF file in llama.cpp, with one sequence of tokens at a time."""

    def __init__(
        self,
        file: Path,
        context_tokens: int,
        adapter: Path | None = None,
        threads: int | None = None,
    ) -> None:
        """Load a file.

        Args:
            file: the GGUF file.
            context_tokens: the longest sequence.
            adapter: the GGUF file of an adapter that is added to it.
            threads: None takes as many as there are cores.

        Raises:
            ModelError: llama.cpp is missing, or cannot read the file.
        """
        self._lib = lib = binding()
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        # weights repacked for AMX crash llama.cpp 0.3.36 of the binding on SmolLM2's shapes
        settings.use_extra_bufts = False
        self._model = lib.llama_model_load_from_file(os.fsencode(file), settings)
        if not self._model:
            raise ModelError(f"llama.cpp cannot read {file}; write it again with force=true")
        self._context = self._new_context(file, context_tokens, threads)
        if adapter is not None:
            try:
                self._add(adapter)
            except ModelError:
                self.close()
                raise
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocabulary = int(lib.llama_vocab_n_tokens(self._vocab))

    def _new_context(self, file: Path, tokens: int, threads: int | None) -> Any:
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = tokens
        settings.n_threads = settings.n_threads_batch = threads or os.cpu_count()
        context = self._lib.llama_init_from_model(self._model, settings)
        if not context:
            self._lib.llama_model_free(self._model)
            raise ModelError(
                f"llama.cpp has no memory for {tokens} tokens of {file}; end other programs, or "
                "set types= to measure no such file"
            )
        return context

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text that may contain special tokens; nothing is added."""
        data = text.encode()
        room = len(data) + 8
        ids = (self._lib.llama_token * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, False, True)
        return list(ids[:count])

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        tokens = (self._lib.llama_token * len(ids))(*ids)
        count = -64 * (len(ids) + 1)
        while count < 0:  # minus the bytes that are needed
            data = ctypes.create_string_buffer(-count)
            count = self._lib.llama_detokenize(
                self._vocab, tokens, len(ids), data, len(data), True, False
            )
        return data.raw[:count].decode(errors="replace")

    def logits(self, ids: Sequence[int], first: int) -> NDArray[np.float32]:
        """Return the logits at the positions from `first` on, `[tokens, vocabulary]`."""
        self._clear()
        self._decode(ids, 0, range(first, len(ids)))
        return np.stack([self._logits_at(n) for n in range(first, len(ids))])

    def generate(
        self,
        prompt_ids: Sequence[int],
        tokens: int,
        stop: bool = True,
        on_token: Callable[[], None] | None = None,
    ) -> list[int]:
        """Return up to `tokens` greedy tokens after a prompt, without the one that ends it."""
        self._clear()
        row = len(prompt_ids) - 1
        self._decode(prompt_ids, 0, [row])
        generated: list[int] = []
        while True:
            token = int(self._logits_at(row).argmax())
            if on_token:
                on_token()
            if stop and self._lib.llama_vocab_is_eog(self._vocab, token):
                return generated
            generated.append(token)
            if len(generated) == tokens:
                return generated
            self._decode([token], len(prompt_ids) + len(generated) - 1, [0])
            row = 0

    def _add(self, adapter: Path) -> None:
        """Add an adapter to the weights, at its own scale.

        Raises:
            ModelError: llama.cpp cannot read it, or it belongs to another base.
        """
        lib = self._lib
        handle = lib.llama_adapter_lora_init(self._model, os.fsencode(adapter))
        if not handle:
            raise ModelError(
                f"llama.cpp cannot add {adapter} to this base; write it again with force=true"
            )
        handles = (lib.llama_adapter_lora_p_ctypes * 1)(handle)
        scales = (ctypes.c_float * 1)(1.0)
        lib.llama_set_adapters_lora(self._context, handles, 1, scales)

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int], position: int, wanted: Collection[int]) -> None:
        """Read tokens, and keep the logits of the wanted ones."""
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for number, token in enumerate(ids):
                batch.token[number] = token
                batch.pos[number] = position + number
                batch.n_seq_id[number] = 1
                batch.seq_id[number][0] = 0
                batch.logits[number] = number in wanted
            status = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if status:
            raise ModelError(f"llama.cpp could not read {len(ids)} tokens (status {status})")

    def _logits_at(self, number: int) -> NDArray[np.float32]:
        """Return the logits of a token of the last batch, `[vocabulary]`."""
        pointer = self._lib.llama_get_logits_ith(self._context, number)
        return np.ctypeslib.as_array(pointer, (self.vocabulary,)).copy()


def _ignore(level: int, text: bytes, data: Any) -> None:
    """Drop a message of llama.cpp's log; what fails raises an error."""
