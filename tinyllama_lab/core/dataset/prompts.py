"""Converts rows to token ids and loss masks, in four prompt styles."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.core.dataset.chat_template import (
    JOINED,
    ChatTemplate,
    Message,
    TokenSequence,
    tokenize,
)
from tinyllama_lab.data.formats.cells import UnusableRow
from tinyllama_lab.data.rows import RawRow, Turn

_LOADED_BY = ("local_files_only", "is_local", "trust_remote_code", "name_or_path")
_MARK = "\x00"  # stands for the question, in which it cannot occur
_DEFAULT_SYSTEM = (
    "{{% if messages[0]['role'] != 'system' %}}"
    "{{% set messages = [{{'role': 'system', 'content': {}}}] + messages %}}{{% endif %}}"
)


class PromptFormat:
    """Turns rows into token sequences in the style `data.style`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        """Inspect the tokenizer once for all rows.

        Raises:
            DataError: `data.style=chat` without a chat template, or with one that needs a date.
        """
        self._data, self._tokenizer = data, tokenizer
        self._text = TextTokenizer(tokenizer)
        self._chat = ChatTemplate(tokenizer, data.date) if data.style == "chat" else None

    def __call__(self, row: RawRow) -> TokenSequence:
        """Return the tokens of one row at full length.

        White space at the beginning of an answer is removed if the tokenizer would join it to
        the prompt, because no server could send that prompt.

        Raises:
            UnusableRow: the style does not support this row.
        """
        try:
            return self._encode(row)
        except UnusableRow as error:
            # only now, so that rows that need no trimming stay as they are
            trimmed = _without_leading_space(row)
            if error.reason != JOINED or trimmed == row:
                raise
        return replace(self._encode(trimmed), is_trimmed=True)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Return the tokens from which the answer to a conversation is generated.

        They are those that a row with these turns has before its answer. The styles without turns
        take the last user turn alone.

        Args:
            messages: a system turn or none, and then turns of user and assistant in turn, the
                last of the user. Without a system turn, that of `data.system` is added.

        Raises:
            UnusableRow: the chat template refuses the conversation.
        """
        if self._chat is not None:
            if self._data.system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self._data.system}, *messages]
            return self._chat.prompt(messages)
        return self._text.begun(prompt_text(self._data.style, str(messages[-1]["content"])))

    def template(self) -> str:
        """Return a chat template that renders the prompts of `prompt`, whatever the style.

        It holds what training added: the date, the system turn and the tokens that start a text.
        """
        if self._chat is not None:
            system = json.dumps(self._data.system or "", ensure_ascii=False)
            return _DEFAULT_SYSTEM.format(system) * bool(self._data.system) + self._chat.source(
                None
            )
        before, _, after = prompt_text(self._data.style, _MARK).partition(_MARK)
        before = self._text.start + before
        parts = (json.dumps(part, ensure_ascii=False) for part in (before, after))
        return "{{{{ {} }}}}{{{{ messages[-1]['content'] }}}}{{{{ {} }}}}".format(*parts)

    def save_tokenizer(self, folder: Path) -> None:
        """Save the tokenizer as transformers does, with `template` as its chat template."""
        tokenizer = copy.copy(self._tokenizer)
        tokenizer.chat_template = self.template()
        # how it was loaded here says nothing about how it is to be loaded elsewhere
        kept = {k: v for k, v in tokenizer.init_kwargs.items() if k not in _LOADED_BY}
        tokenizer.init_kwargs = kept
        tokenizer.save_pretrained(folder)

    def _encode(self, row: RawRow) -> TokenSequence:
        if self._chat is not None:
            messages, supervised = conversation(row, self._data)
            tools = json.loads(row.tools) if row.tools else None
            return self._chat(messages, supervised, tools, self._data.max_length)
        if self._data.style == "text":
            return self._text.whole(row.response, self._data.max_length)
        if self._data.style == "query_intent_response":
            answer = f"Intent: {row.intent}\nResponse: {row.response}"
            prompt = prompt_text(self._data.style, row.prompt)
            return self._text.answered(prompt, answer, row.prompt)
        prompt = prompt_text(self._data.style, row.prompt, row.context)
        return self._text.answered(prompt, row.response, _question(row))


def prompt_text(style: str, question: str, context: str = "") -> str:
    """Return the text before an answer, in a style without turns."""
    if style == "text":
        return question
    if style == "query_intent_response":
        return f"Query: {question}\n"
    context = f"### Context:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{question}\n\n{context}### Response:\n"


def conversation(row: RawRow, data: DataConfig) -> tuple[list[Message], list[bool]]:
    """Return the messages of a row, and whether each is supervised.

    A chat's own system turn comes before the row's system column, and that before
    `data.system`.
    """
    turns = list(row.messages)
    if not turns:
        turns = [Turn("user", _question(row)), Turn("assistant", row.response)]
    system = row.system or data.system
    if system and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    roles = [turn.role for turn in turns]
    first = roles.index("user")  # an assistant turn before it answers no prompt
    supervised = [
        turn.role == "assistant" and turn.supervised and number > first
        for number, turn in enumerate(turns)
    ]
    if data.learn == "last":
        last = max(n for n, role in enumerate(roles) if role == "assistant")
        supervised = [is_answer and n == last for n, is_answer in enumerate(supervised)]
    if not any(supervised):
        raise UnusableRow("nothing_supervised", "every assistant turn has the weight 0")
    messages = [
        {"role": turn.role, "content": turn.content, **json.loads(turn.extra or "{}")}
        for turn in turns
    ]
    return messages, supervised


def _question(row: RawRow) -> str:
    return f"{row.prompt}\n\n{row.context}" if row.context else row.prompt


class TextTokenizer:
    """Tokenizes plain text, with the tokens that start and end a sequence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._end = int(tokenizer.eos_token_id)
        self._start = _start_tokens(tokenizer)

    @property
    def start(self) -> str:
        """Return the text of the tokens that start a sequence."""
        return str(self._tokenizer.decode(self._start)) if self._start else ""

    def begun(self, text: str) -> list[int]:
        """Return the tokens of a text that a completion continues."""
        return self._start + tokenize(self._tokenizer, text)

    def answered(self, prompt: str, response: str, question: str) -> TokenSequence:
        """Return a prompt and a response; the response and its end token are supervised."""
        response = response.removesuffix(str(self._tokenizer.eos_token))
        before = self.begun(prompt)
        ids = [*self.begun(prompt + response), self._end]
        # generation starts from the tokens of the prompt alone, so training must begin with them
        if ids[: len(before)] != before:
            raise UnusableRow(JOINED, "the tokenizer joins prompt and response")
        supervised = [n >= len(before) for n in range(len(ids))]
        return TokenSequence(ids, supervised, len(before), response, question)

    def whole(self, text: str, max_tokens: int) -> TokenSequence:
        """Return a fully supervised text; generation continues its first half.

        Args:
            text: the text.
            max_tokens: the number of tokens that are kept.
        """
        text = text.removeprefix(str(self._tokenizer.bos_token))
        text = text.removesuffix(str(self._tokenizer.eos_token))
        body = tokenize(self._tokenizer, text)
        ids = [*self._start, *body, self._end]
        # a plain text has no prompt: its first half serves as one
        prompt = min(len(ids), max_tokens) // 2 + 1
        first, continuation = (
            str(self._tokenizer.decode(part, skip_special_tokens=True))
            for part in (ids[:prompt], ids[prompt:max_tokens])
        )
        return TokenSequence(ids, [True] * len(ids), prompt, continuation, first)


def _without_leading_space(row: RawRow) -> RawRow:
    turns = [
        replace(turn, content=turn.content.lstrip()) if turn.role == "assistant" else turn
        for turn in row.messages
    ]
    return replace(row, response=row.response.lstrip(), messages=tuple(turns))


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before a text; those after it are not wanted."""
    plain, whole = tokenize(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return whole[:begin]
    return []
