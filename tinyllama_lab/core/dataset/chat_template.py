"""A tokenizer's chat template: conversations to token ids, and which of them are answers.

The ids are those of the whole rendered conversation, up to the end of the last supervised
answer, as in other trainers and in servers. Tokenizing turn by turn would give different ids,
because a SentencePiece tokenizer adds a space before every piece.
"""

from __future__ import annotations

import datetime
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tinyllama_lab.core.limited import render
from tinyllama_lab.data.formats.cells import UnusableRow
from tinyllama_lab.errors import DataError

Message = dict[str, Any]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE_CALL = re.compile(r"strftime_now\s*\(([^)]*)\)")
_LITERAL = re.compile(r"\s*(?:\"([^\"]*)\"|'([^']*)')\s*")
# what a template raises on a conversation it does not take, on purpose or not
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
JOINED = "joined"  # reason of an unusable row: the tokenizer joins prompt and answer
_MARK = re.compile(r"[<\[][^\s<>]+[>\]]")  # an added token such as <|im_end|>, special or not
_REASONING = ("reasoning_content", "thinking")
_THINKING = "</think>"  # templates of reasoning models leave it out of earlier turns


@dataclass
class TokenSequence:
    """One row as tokens."""

    ids: list[int]
    supervised: list[bool]  # the loss mask, one value per token
    prompt: int  # number of leading tokens from which generation starts
    response: str  # the reference completion
    question: str = ""  # the prompt as shown to users
    is_folded: bool = False  # the system turn stands in the first user turn
    is_trimmed: bool = False  # answers lost the white space that they began with


class ChatTemplate:
    """A tokenizer's chat template, rendered for a fixed date, and the end of its answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "data.style=chat needs a tokenizer with a chat template, got none in this model; "
                "set data.style=instruction_response"
            )
        self.tokenizer = tokenizer
        self._day = datetime.date.fromisoformat(date) if date else None
        self._sources: dict[bool, str] = {}  # by whether there are tools
        added = tokenizer.added_tokens_decoder.values()
        marks = (str(each) for each in added if each.special or _MARK.fullmatch(str(each)))
        special = {str(tokenizer.eos_token), *marks}
        names = sorted(special, key=len, reverse=True)  # longest first: one may contain another
        self.special = re.compile("|".join(re.escape(each) for each in names if each))
        self._writes_system = self._has_place_for_system()
        self.closing = self._find_closing()  # the special token after an answer, if there is one

    def __call__(
        self,
        messages: list[Message],
        supervised: Sequence[bool],
        tools: Any = None,
        max_tokens: int | None = None,
    ) -> TokenSequence:
        """Return the tokens of a conversation.

        Args:
            messages: the conversation.
            supervised: whether each message is trained on.
            tools: tool definitions for the template.
            max_tokens: the number of tokens that are kept. Generation starts from the prompt of
                the last answer that begins within them.

        Raises:
            UnusableRow: the template refuses the conversation, drops a part of it, or renders
                it so that answers cannot be told from prompts.
        """
        _check_places(self.source(tools), messages, tools)
        rendered, text = self._render_whole(messages, tools)
        is_folded = len(rendered) < len(messages)
        # folding removes the system message, so the numbers of the others drop by one
        answers = [n - is_folded for n, is_answer in enumerate(supervised) if is_answer]
        _check_nothing_is_lost(rendered, answers, text)
        chat = _Conversation(self, rendered, tools, text)
        chat.prompt(answers[-1])
        spans = chat.spans(answers)
        pairs = zip(answers, spans, strict=True)
        begun = [n for n, (begin, _) in pairs if max_tokens is None or begin < max_tokens]
        last = begun[-1] if begun else answers[0]
        _, prompt = chat.prompt(last)
        ids = chat.ids[: max(end for _, end in spans)]  # later tokens have no effect on the loss
        mask = [False] * len(ids)
        for begin, end in spans:
            mask[begin:end] = [True] * (end - begin)
        question = _in_words(messages[: last + is_folded])
        response = str(rendered[last]["content"])
        return TokenSequence(ids, mask, prompt, response, question, is_folded)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Return the tokens of a conversation and of the header of the answer to it.

        Raises:
            UnusableRow: the template refuses the conversation.
        """
        rendered, _ = self._render_whole(messages, None)
        return tokenize(self.tokenizer, self.render(rendered, None, generate=True))

    def _render_whole(self, messages: list[Message], tools: Any) -> tuple[list[Message], str]:
        """Render the conversation; join its system turn to the first user turn if necessary."""
        system = str(messages[0]["content"]) if messages[0]["role"] == "system" else ""
        refusal = UnusableRow("template_refused", "the chat template leaves out the system turn")
        try:
            text = self.render(messages, tools)
            if not system or self._writes_system:
                return messages, text
        except UnusableRow as error:
            refusal = error
        if system and len(messages) > 1 and messages[1]["role"] == "user":
            first = {**messages[1], "content": f"{system}\n\n{messages[1]['content']}"}
            folded = [first, *messages[2:]]
            try:
                return folded, self.render(folded, tools)
            except UnusableRow as error:
                refusal = error  # the system turn was not the reason
        raise refusal

    def _has_place_for_system(self) -> bool:
        """Return whether the template renders a system turn, or drops it silently."""
        probe = [{"role": "system", "content": "Sys4711"}, {"role": "user", "content": "Hi"}]
        try:
            return "Sys4711" in self.render(probe, None)
        except UnusableRow:
            return True  # the template itself raises an error then

    def _find_closing(self) -> str | None:
        probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes4711"}]
        try:
            tail = self.render(probe, None).rpartition("Yes4711")[2]
        except UnusableRow:
            return str(self.tokenizer.eos_token)
        mark = self.special.search(tail)
        return mark[0] if mark else None

    @property
    def closing_id(self) -> int:
        """Return the token that ends an answer."""
        if self.closing is None:
            return int(self.tokenizer.eos_token_id)
        return tokenize(self.tokenizer, self.closing)[0]

    def render(self, messages: list[Message], tools: Any, generate: bool = False) -> str:
        """Render the conversation; with `generate`, add the header of the next answer.

        Raises:
            UnusableRow: the template refuses the conversation.
        """
        return str(self.apply(messages, tools, tokenize=False, add_generation_prompt=generate))

    def apply(self, messages: list[Message], tools: Any, **options: Any) -> Any:
        """Call `apply_chat_template` with the configured date."""
        source = self.source(tools)
        if self._day is not None and "date_string" in source:
            options["date_string"] = self._day.strftime("%d %b %Y")
        try:
            return render(self.tokenizer, messages, tools=tools, chat_template=source, **options)
        except _REFUSALS as error:
            message = " ".join(str(error).split())[:200] or type(error).__name__
            raise UnusableRow("template_refused", f"the chat template says: {message}") from error

    def source(self, tools: Any) -> str:
        """Return the template's source, with the configured date instead of the clock."""
        if bool(tools) not in self._sources:
            try:
                plain = str(self.tokenizer.get_chat_template(tools=tools))
            except ValueError as error:  # several templates, and none is the default
                raise DataError(
                    f"data.style=chat needs a chat template that is the default, got: {error}; "
                    "name one of them default in the model's folder"
                ) from error
            self._sources[bool(tools)] = _at_day(plain, self._day)
        return self._sources[bool(tools)]


class _Conversation:
    """One rendered chat, and the positions of its answers."""

    def __init__(
        self, template: ChatTemplate, messages: list[Message], tools: Any, text: str
    ) -> None:
        if template.closing is None:  # only the end of the sequence can end the answer
            text += str(template.tokenizer.eos_token)
        self._template, self._messages, self._tools, self._text = template, messages, tools, text
        self.ids, self._offsets = _with_offsets(template.tokenizer, text)
        self._has_true_offsets: bool | None = None  # known after the first prompt

    def prompt(self, number: int) -> tuple[int, int]:
        """Return the characters and tokens of the prompt that a server would send for an answer.

        The tokens of the first prompt are compared with those of the prompt tokenized alone. If
        the offsets agree, they are trusted for the other prompts.

        Raises:
            UnusableRow: the conversation does not begin with this prompt.
        """
        text = self._template.render(self._messages[:number], self._tools, generate=True)
        if not self._text.startswith(text):
            raise UnusableRow(
                "unaligned",
                "the chat template renders earlier turns differently once an answer follows; "
                "set data.learn=last, or take another model",
            )
        if not self._has_true_offsets:
            ids = tokenize(self._template.tokenizer, text)
            if self.ids[: len(ids)] != ids:
                raise UnusableRow(JOINED, "the tokenizer joins the prompt and the answer")
            self._has_true_offsets = self._tokens_before(len(text)) == len(ids)
            return len(text), len(ids)
        tokens = self._tokens_before(len(text))
        if tokens is None:
            raise UnusableRow(JOINED, "the tokenizer joins the prompt and the answer")
        return len(text), tokens

    def spans(self, answers: Sequence[int]) -> list[tuple[int, int]]:
        """Return the token range of every supervised answer, including its closing token."""
        if _GENERATION_MARK.search(self._template.source(self._tools)):
            return self._marked_spans(answers)
        spans = []
        for number in answers:
            characters, begin = self.prompt(number)
            end = self._answer_end(number, characters)
            tokens = self._tokens_before(end) if self._has_true_offsets else None
            if tokens is None:  # the closing text may share a token with the text after it
                closed = tokenize(self._template.tokenizer, self._text[:end])
                tokens = _shared(closed, self.ids)
            spans.append((begin, tokens))
        return spans

    def _tokens_before(self, characters: int) -> int | None:
        """Return the tokens of the first `characters`; None if a token crosses the end."""
        ends = [end for _, end in self._offsets]
        count = bisect_right(ends, characters)
        is_across = count < len(ends) and self._offsets[count][0] < characters
        return None if is_across else count

    def _marked_spans(self, answers: Sequence[int]) -> list[tuple[int, int]]:
        """Return the ranges between the template's own generation marks."""
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self._template.apply(self._messages, self._tools, tokenize=True, **options)
        mask = [0, *encoded["assistant_masks"], 0]
        edges = [n - 1 for n in range(1, len(mask)) if mask[n] != mask[n - 1]]
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        turns = [n for n, each in enumerate(self._messages) if each["role"] == "assistant"]
        if len(runs) != len(turns):
            raise UnusableRow("unaligned", "the template marks parts other than its answers")
        closing = [self._template.closing_id]
        spans = [runs[turns.index(number)] for number in answers]
        return [(b, e + 1 if self.ids[e : e + 1] == closing else e) for b, e in spans]

    def _answer_end(self, number: int, begin: int) -> int:
        """Return the end, in characters, of the answer at `begin`, including what closes it."""
        content = str(self._messages[number]["content"]).strip()
        at = self._text.find(content, begin)
        after = at + len(content) if at >= 0 else begin
        template = self._template
        if template.closing is None:
            return self._turn_end(number)[0]
        special = template.special.search(self._text, after)
        if special is None:
            return after
        if special[0] != template.closing:  # another token closes it, or none does
            limit, has_header = self._turn_end(number)
            close = self._text.find(template.closing, after, limit)
            if close >= 0:
                return close + len(template.closing)
            ends = [each.end() for each in template.special.finditer(self._text, after, limit)]
            return ends[0 if has_header else -1] if ends else after
        return special.end()

    def _turn_end(self, number: int) -> tuple[int, bool]:
        """Return the end of a turn in characters, and whether the next header is before it."""
        if number == len(self._messages) - 1:
            return len(self._text), False
        text = self._template.render(self._messages[: number + 1], self._tools)
        if self._text.startswith(text):
            return len(text), False
        # a last turn is rendered differently: compare with a chat whose next turn has another text
        following = {**self._messages[number + 1], "content": "\ue000"}
        others = [*self._messages[: number + 1], following, *self._messages[number + 2 :]]
        return _shared(self._text, self._template.render(others, self._tools)), True


def _in_words(messages: Sequence[Message]) -> str:
    """Return the prompt of an answer as shown to users: all turns before it.

    A system turn is not shown: it is the same in every row, or a long one.
    """
    turns = [each for each in messages if each["role"] != "system"]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{each['role']}: {each['content'] or '(a tool call)'}" for each in turns)


def _check_places(template: str, messages: Sequence[Message], tools: Any) -> None:
    """Check that a template supports the tools and reasoning of a conversation.

    Raises:
        UnusableRow: it does not.
    """
    calls = any(each["role"] == "tool" or "tool_calls" in each for each in messages)
    if (tools and "tools" not in template) or (calls and "tool" not in template):
        way_out = "" if calls else "; without the definitions: data.columns.tools=''"
        raise UnusableRow(
            "tool_calls", f"the model's chat template has no place for tools{way_out}"
        )
    has_reasoning = any(key in each for each in messages for key in _REASONING)
    if has_reasoning and not any(key in template for key in _REASONING):
        raise UnusableRow("text_lost", "the chat template has no place for reasoning")


def _check_nothing_is_lost(messages: list[Message], answers: Sequence[int], text: str) -> None:
    """Check that the text contains every turn, because templates may silently drop some."""
    for number, message in enumerate(messages):
        content = str(message["content"]).strip()
        is_read = message["role"] in ("system", "user") or number in answers
        if is_read and _THINKING not in content and content not in text:
            raise UnusableRow(
                "text_lost", f"the chat template leaves out text of a {message['role']} turn"
            )


def _at_day(template: str, day: datetime.date | None) -> str:
    """Return the template with its own `strftime_now`, which returns one fixed day.

    Raises:
        DataError: it asks for the date and none is set, or it computes the date's format.
    """
    calls = _DATE_CALL.findall(template)
    if not calls:
        return template
    formats = [_LITERAL.fullmatch(call) for call in calls]
    if day is None or None in formats:
        today = datetime.date.today().isoformat()
        raise DataError(
            "the model's chat template asks for today's date, so that its prompts differ from "
            f"day to day; set data.date={today}"
            if day is None
            else "the model's chat template computes the date in a way that cannot be fixed; "
            "set data.style=instruction_response"
        )
    dates = {f[1] or f[2]: day.strftime(f[1] or f[2]) for f in formats if f}
    # `+%}` keeps Jinja from eating a line break at the template's beginning
    macro = f"{{% macro strftime_now(format) %}}{{{{ {json.dumps(dates)}[format] }}}}"
    return macro + "{% endmacro +%}" + template


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that ends an answer in the chat template; empty without a template."""
    if not tokenizer.chat_template:
        return []
    try:
        return [ChatTemplate(tokenizer, date="2000-01-01").closing_id]  # the same on any day
    except DataError:
        return []  # raised again if the template is used; other styles do not need it


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text, without the tokens that the tokenizer adds around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _with_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a text and their character offsets; slow tokenizers have no offsets."""
    if not tokenizer.is_fast:
        return tokenize(tokenizer, text), []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]


def _shared(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))
