"""The base of a study with adapters on it, as a partner in a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.chat_template import Message
from tinyllama_lab.core.dataset.prompts import PromptFormat
from tinyllama_lab.core.engines.sampling import TokenSampling
from tinyllama_lab.core.models.loading import load_base, model_folder, position_count
from tinyllama_lab.core.models.saved import check_saved
from tinyllama_lab.data.formats.cells import UnusableRow
from tinyllama_lab.deploy.completer import Completion, Request, TextStream, completer
from tinyllama_lab.deploy.selection import Selection
from tinyllama_lab.deploy.trained import prompt_format
from tinyllama_lab.errors import DataError, StudyError


class Assistant:
    """A base and adapters of one study; every adapter answers in the format of its own data."""

    def __init__(self, selection: Selection, device: str) -> None:
        """Load the base of a trial, and its adapter.

        Raises:
            ModelError: the base or the device is not available.
            StudyError: the adapter does not fit the base.
        """
        self._science = part(Science, selection.trial.config)
        science = self._science
        self.base = load_base(science.model, science.quant, science.train.precision, device)
        self._positions = position_count(model_folder(science.model))
        self.completer = completer(self.base, science.lora)
        self._formats: dict[str, PromptFormat] = {}
        self.add(selection)
        # the base answers in the format of the first adapter, to be compared with it
        self._base_format = self._formats[selection.label]

    def add(self, selection: Selection) -> None:
        """Load the adapter of another trial on the same base, under its label.

        Raises:
            StudyError: it was trained on another base, or cannot run beside the others.
            DataError: its data must be read to know its prompts, and cannot be.
        """
        if selection.label in self._formats:
            return
        science: Science = part(Science, selection.trial.config)
        if _base_of(science) != _base_of(self._science):
            raise StudyError(
                f"all adapters here share one base, and {selection.label} was trained on another "
                f"one; start again with trial={selection.trial.key}"
            )
        trial = selection.trial.row.trial
        # first: an adapter without a format must not stay in memory
        check_saved(trial.adapter_dir, science.lora.is_full)
        trained_format = prompt_format(trial, self.base.tokenizer)
        self.completer.load(selection.label, trial)
        self._formats[selection.label] = trained_format

    def request(
        self,
        label: str | None,
        messages: Sequence[Message],
        tokens: int,
        sampling: TokenSampling | None = None,
    ) -> Request:
        """Return the request that answers a conversation.

        Args:
            label: of an adapter; None is the base.
            messages: as `PromptFormat.prompt` takes them.
            tokens: the most tokens of the answer.
            sampling: how tokens are drawn; None is greedy.

        Raises:
            DataError: the chat template refuses the conversation, or it is too long.
        """
        prompt_format = self._base_format if label is None else self._formats[label]
        try:
            ids = prompt_format.prompt(list(messages))
        except UnusableRow as error:
            raise DataError(
                f"this conversation has no prompt in the trained format: {error}"
            ) from error
        room = None if self._positions is None else self._positions - len(ids)
        if room is not None and room < 1:
            raise DataError(
                f"a prompt and its answer must fit {self._positions} tokens, got a prompt of "
                f"{len(ids)}; shorten it, or begin a new conversation"
            )
        return Request(label, tuple(ids), min(tokens, room or tokens), sampling)

    def begin(self, request: Request) -> Completion:
        """Put a request into the queue."""
        return self.completer.begin(request)

    def tokens(self, completion: Completion) -> Iterator[int]:
        """Yield the tokens of a completion as they come; closing the iterator cancels it."""
        try:
            while completion.reason is None:
                count = len(completion.ids)
                self.completer.step()
                yield from completion.ids[count:]
        finally:
            completion.reason = completion.reason or "cancelled"

    def text_stream(self) -> TextStream:
        """Return what turns the tokens of a completion into text."""
        tokenizer: Any = self.base.tokenizer
        return TextStream(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))


def _base_of(science: Science) -> tuple[Any, ...]:
    """Return what two trials on one loaded base have in common."""
    model = science.model
    return model.source, model.repo, model.identity, science.quant, science.train.precision
