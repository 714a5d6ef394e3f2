"""Runs and quantizes GGUF files in llama.cpp, on the CPU, through its Python binding.

Nothing here imports torch, so that a process that measures a file has llama.cpp's memory alone.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

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


class _Token(NamedTuple):
    """A token that is read next."""

    token: int
    position: int
    row: int
    is_wanted: bool  # whether the logits after it are kept


class GgufModel:
    """A GGUF file in llama.cpp."""

    def __init__(
        self, file: Path, context_tokens: int, adapter: Path | None = None, rows: int = 1
    ) -> None:
        """Load a file.

        Args:
            file: the GGUF file.
            context_tokens: the longest sequence.
            adapter: the GGUF file of an adapter that is added to it.
            rows: sequences that `answers` continues at a time; each takes memory.

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
        self._rows = rows
        self._context = self._new_context(file, context_tokens)
        if adapter is not None:
            try:
                self._add(adapter)
            except ModelError:
                self.close()
                raise
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocabulary = int(lib.llama_vocab_n_tokens(self._vocab))

    def _new_context(self, file: Path, tokens: int) -> Any:
        settings = self._lib.llama_context_default_params()
        settings.n_batch = settings.n_ubatch = max(tokens, self._rows)
        settings.n_seq_max, settings.n_ctx = self._rows, self._rows * tokens
        settings.n_threads = settings.n_threads_batch = os.cpu_count()
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
        self._read([_Token(token, n, 0, n >= first) for n, token in enumerate(ids)])
        return np.stack([self._logits_at(n) for n in range(first, len(ids))])

    def generate(
        self, prompt_ids: Sequence[int], tokens: int, on_token: Callable[[], None]
    ) -> list[int]:
        """Return `tokens` greedy tokens after a prompt; `on_token` is called after each."""
        return self._greedy([prompt_ids], tokens, False, on_token)[0]

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Return up to `tokens` greedy tokens after every prompt, without the one that ends it."""
        groups = [prompts[n : n + self._rows] for n in range(0, len(prompts), self._rows)]
        return [answer for group in groups for answer in self._greedy(group, tokens, True)]

    def _greedy(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        stop: bool,
        on_token: Callable[[], None] | None = None,
    ) -> list[list[int]]:
        self._clear()
        generated: list[list[int]] = [[] for _ in prompts]
        chosen = dict[int, int]()  # the next token of every row that goes on
        for row, ids in enumerate(prompts):
            last = len(ids) - 1
            self._read([_Token(token, n, row, n == last) for n, token in enumerate(ids)])
            chosen[row] = self._chosen_at(last)
        while True:
            if on_token:
                on_token()
            for row, token in list(chosen.items()):
                if stop and self._lib.llama_vocab_is_eog(self._vocab, token):
                    del chosen[row]
                else:
                    generated[row].append(token)
            chosen = {row: t for row, t in chosen.items() if len(generated[row]) < tokens}
            if not chosen:
                return generated
            self._read(
                [
                    _Token(token, len(prompts[row]) + len(generated[row]) - 1, row, True)
                    for row, token in chosen.items()
                ]
            )
            chosen = {row: self._chosen_at(number) for number, row in enumerate(chosen)}

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

    def _read(self, tokens: Sequence[_Token]) -> None:
        """Read tokens, and keep the logits of the wanted ones."""
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for number, each in enumerate(tokens):
                batch.token[number] = each.token
                batch.pos[number] = each.position
                batch.n_seq_id[number] = 1
                batch.seq_id[number][0] = each.row
                batch.logits[number] = each.is_wanted
            status = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if status:
            raise ModelError(f"llama.cpp could not read {len(tokens)} tokens (status {status})")

    def _chosen_at(self, number: int) -> int:
        return int(self._logits_at(number).argmax())

    def _logits_at(self, number: int) -> NDArray[np.float32]:
        """Return the logits of a token of the last batch, `[vocabulary]`."""
        pointer = self._lib.llama_get_logits_ith(self._context, number)
        return np.ctypeslib.as_array(pointer, (self.vocabulary,)).copy()


def _ignore(level: int, text: bytes, data: Any) -> None:
    """Drop a message of llama.cpp's log; what fails raises an error."""
