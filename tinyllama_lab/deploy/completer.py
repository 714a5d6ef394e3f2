"""Completes prompts under several adapters of one base, token by token.

Requests join and leave between two tokens, so that a long answer does not hold up others. The
packed engine decodes all of them in the same matmuls; adapters that need PEFT take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import peft
import torch
from safetensors import SafetensorError

from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed.adapter import PackedAdapter
from tinyllama_lab.core.engines.packed.decode import Decoder
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.packed.llama import FrozenLlama, why_not_llama
from tinyllama_lab.core.engines.sampling import Chooser, TokenSampling
from tinyllama_lab.core.models.base_weights import BaseCopies, biases, load_whole, train_whole
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.models.quiet import no_bias_warning, no_peft_deprecation
from tinyllama_lab.errors import ModelError, StudyError
from tinyllama_lab.study.trial import TrialFolder

MOST_ROWS = 32  # completions at the same time
_UNFIT = (RuntimeError, ValueError, KeyError, ModelError)


@dataclass(frozen=True)
class Request:
    """What to complete, and how.

    `adapter` is a name that the completer knows; None is the bare base.
    """

    adapter: str | None
    prompt_ids: tuple[int, ...]
    tokens: int  # the most new ones
    sampling: TokenSampling | None = None  # None is greedy


@dataclass(eq=False)
class Completion:
    """A request in progress, or finished if `reason` is set.

    The end token is not part of `ids`.
    """

    request: Request
    ids: list[int] = field(default_factory=list)
    reason: str | None = None  # `stop` after an end token, `length`, or `cancelled`
    _choose: Chooser = field(init=False, repr=False)

    def __post_init__(self) -> None:
        request = self.request
        self._choose = Chooser(request.sampling, [self.example], request.tokens)

    @property
    def example(self) -> Example:
        """Return the prompt as the engines take it."""
        return Example((), (), self.request.prompt_ids, "", "", "")

    def take(self, logits: torch.Tensor, ends: tuple[int, ...]) -> int:
        """Choose the next token from `logits [vocabulary]`, and return it."""
        token = int(self._choose(logits[None], [0], len(self.ids)))
        if token in ends:
            self.reason = "stop"
            return token
        self.ids.append(token)
        if len(self.ids) == self.request.tokens:
            self.reason = "length"
        return token


class Completer(Protocol):
    """Completes requests; one thread alone may call it."""

    def load(self, name: str, trial: TrialFolder) -> None:
        """Add the adapter of a trial under a name.

        Raises:
            StudyError: the adapter does not fit this base, or cannot run beside the others.
        """

    def begin(self, request: Request) -> Completion:
        """Put a request into the queue."""

    def step(self) -> list[Completion]:
        """Take one token for every completion that has a row, and return these completions."""

    def clear(self) -> None:
        """Forget all completions, and free their keys and values."""

    @property
    def is_idle(self) -> bool:
        """Return whether nothing is waiting or in progress."""


def completer(base: Base, lora: LoraConfig) -> Completer:
    """Return a completer of a base, for adapters of such settings."""
    return PackedCompleter(base) if can_pack(base, lora) else PeftCompleter(base)


def can_pack(base: Base, lora: LoraConfig) -> bool:
    """Return whether rows of several adapters can join and leave one decoder on a base."""
    return not (why_not_llama(base.model) or lora.not_packed)


class PackedCompleter:
    """Decodes completions of all adapters together."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._engine = PackedEngine(base)
        self._adapters: dict[str, PackedAdapter] = {}
        assert isinstance(self._engine.model, FrozenLlama)  # `can_pack` said so
        self._llama = self._engine.model
        self._decoder = Decoder(self._llama)
        self._running: dict[WorkItem[PackedAdapter], Completion] = {}
        self._waiting: list[Completion] = []

    def load(self, name: str, trial: TrialFolder) -> None:
        """Add the adapter of a trial under a name; see `Completer`."""
        science = part(Science, trial.read_config())
        if why := science.lora.not_packed:
            raise StudyError(
                f"adapters decode together here, and {trial.name} cannot ({why}); "
                f"start again with trial={trial.key}"
            )
        with _fitting(trial):
            # one seed for all: PEFT's initial values, made once, are overwritten
            adapter = self._engine.add(science.lora, 0)
            adapter.load(trial.adapter_dir)
        adapter.freeze()
        self._adapters[name] = adapter

    def begin(self, request: Request) -> Completion:
        """Put a request into the queue."""
        completion = Completion(request)
        self._waiting.append(completion)
        return completion

    def step(self) -> list[Completion]:
        """Take one token for every completion that has a row, and return these completions."""
        self._join()
        chosen = [
            self._running[item].take(logits, self._base.end_ids)
            for item, logits in zip(self._decoder.items, self._decoder.logits, strict=True)
        ]
        stepped = list(self._running.values())
        alive = [n for n, item in enumerate(self._decoder.items) if not self._running[item].reason]
        self._keep(alive)
        if alive:
            self._decoder.step(torch.tensor([chosen[n] for n in alive], device=self._base.device))
        return stepped

    def clear(self) -> None:
        """Forget all completions, and free their keys and values."""
        self._waiting, self._running = [], {}
        self._decoder = Decoder(self._llama)

    @property
    def is_idle(self) -> bool:
        """Return whether nothing is waiting or in progress."""
        return not self._running and not self._waiting

    def _join(self) -> None:
        """Drop cancelled completions, and give rows to waiting ones."""
        items = self._decoder.items
        self._keep([n for n, item in enumerate(items) if not self._running[item].reason])
        self._waiting = [each for each in self._waiting if not each.reason]
        joining, self._waiting = self._admitted()
        if joining:
            # sorted by adapter, as the engine wants its items
            joining.sort(key=lambda each: each.request.adapter or "")
            items = [WorkItem(self._adapter(each.request), each.example) for each in joining]
            self._decoder.add(items, [each.request.tokens for each in joining])
            self._running |= zip(items, joining, strict=True)

    def _admitted(self) -> tuple[list[Completion], list[Completion]]:
        """Return the waiting completions whose keys and values have room now, and the others."""
        running = list(self._running.values())
        for count, _ in enumerate(self._waiting):
            members = [*running, *self._waiting[: count + 1]]
            items: list[WorkItem[PackedAdapter]] = [WorkItem(None, m.example) for m in members]
            tokens = max(member.request.tokens for member in members)
            most = min(MOST_ROWS, self._engine.max_prompts(items, tokens))
            if len(members) > max(most, 1):
                return self._waiting[:count], self._waiting[count:]
        return self._waiting, []

    def _adapter(self, request: Request) -> PackedAdapter | None:
        return None if request.adapter is None else self._adapters[request.adapter]

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self._decoder.items):
            return
        kept = [self._decoder.items[row] for row in rows]
        self._running = {item: self._running[item] for item in kept}
        if rows:
            self._decoder.keep(rows)
        else:  # frees the caches
            self._decoder = Decoder(self._llama)


class PeftCompleter:
    """Decodes one completion after another in transformers' own forward pass."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._model: Any = base.model
        self._names: dict[str, str] = {}  # of adapters in PEFT, which takes no dots
        self._copies: BaseCopies | None = None  # of what the only trial trained of the base
        self._queue: list[Completion] = []
        self._past: Any = None  # keys and values of the first in the queue

    def load(self, name: str, trial: TrialFolder) -> None:
        """Add the adapter of a trial under a name; see `Completer`."""
        folder, own = str(trial.adapter_dir), f"adapter_{len(self._names)}"
        lora: LoraConfig = part(Science, trial.read_config()).lora
        changes_base = lora.is_full or lora.bias != "none"
        if self._names and (changes_base or self._copies is not None):
            raise StudyError(
                "a trial that trained biases or all weights of the base answers alone here, and "
                f"{trial.name} is to answer beside others; start again with trial={trial.key}"
            )
        if changes_base:  # in copies, because the bare base answers too
            model = self._base.model
            self._copies = train_whole(model) if lora.is_full else BaseCopies(model, biases(model))
        with _fitting(trial), no_peft_deprecation():
            if lora.is_full:
                load_whole(self._model, trial.adapter_dir)
            elif isinstance(self._model, peft.PeftModel):
                self._model.load_adapter(folder, adapter_name=own)
            else:
                self._model = peft.PeftModel.from_pretrained(self._model, folder, own)
        self._model.eval()
        self._names[name] = own

    def begin(self, request: Request) -> Completion:
        """Put a request into the queue."""
        completion = Completion(request)
        self._queue.append(completion)
        return completion

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Take one token for the first completion of the queue, and return it."""
        while self._queue and self._queue[0].reason:
            self._queue.pop(0)
            self._past = None
        if not self._queue:
            return []
        completion = self._queue[0]
        ids = completion.ids[-1:] if self._past is not None else completion.request.prompt_ids
        inputs = torch.tensor([ids], device=self._base.device)
        with self._under(completion.request.adapter):
            output = self._model(input_ids=inputs, past_key_values=self._past, use_cache=True)
        self._past = output.past_key_values
        completion.take(output.logits[0, -1], self._base.end_ids)
        return [completion]

    def clear(self) -> None:
        """Forget all completions, and free their keys and values."""
        self._queue, self._past = [], None

    @property
    def is_idle(self) -> bool:
        """Return whether nothing is waiting or in progress."""
        return all(completion.reason for completion in self._queue)

    @contextmanager
    def _under(self, name: str | None) -> Iterator[None]:
        """Run the block with an adapter, or with the bare base."""
        with self._copies.set_aside() if self._copies and name is None else nullcontext():
            with self._adapter(name):
                yield

    @contextmanager
    def _adapter(self, name: str | None) -> Iterator[None]:
        if not isinstance(self._model, peft.PeftModel):
            yield
        elif name is None:
            with no_bias_warning(), self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(self._names[name])
            yield


@contextmanager
def _fitting(trial: TrialFolder) -> Iterator[None]:
    """Turn the errors of an adapter that does not fit the base into one sentence."""
    try:
        yield
    except (*_UNFIT, OSError, SafetensorError) as error:
        raise StudyError(
            f"{trial.adapter_dir} must hold the adapter that was trained on this base, and it "
            f"does not fit ({' '.join(str(error).split())[:200]}); run the trial's command again"
        ) from error


class TextStream:
    """Turns tokens into text, piece by piece: a character may take several tokens."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._text = ""

    def push(self, token: int) -> str:
        """Return the text that a token adds; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        added, self._text = text[len(self._text) :], text
        return added

    def end(self) -> str:
        """Return what is left: an incomplete character."""
        return self._decode(self._ids)[len(self._text) :]
