"""Reads transcripts: chats that are written as one text, with marks for who speaks.

It knows the marks of common templates: `<|im_start|>user`, `<|user|>`, `[INST]`,
`### Instruction:`, `User:`, `Q:`. In a text without them, any label before a colon at the
beginning of a line names a speaker (`Customer: ...`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from tinyllama_lab.data.formats.columns import PROMPTS, RESPONSES, SYSTEMS
from tinyllama_lab.data.formats.turns import ROLES
from tinyllama_lab.data.rows import RawRow

_SIDES = {
    **dict.fromkeys((*PROMPTS, "q", "inst", "/sys"), "user"),
    **dict.fromkeys((*RESPONSES, "a", "/inst"), "assistant"),
    **dict.fromkeys((*SYSTEMS, "sys"), "system"),
    **ROLES,
}
_WORDS = "|".join(sorted((word for word in _SIDES if word[0] != "/"), key=len, reverse=True))
_TITLES = "|".join(f"{word.title()}|{word.upper()}" for word in _WORDS.split("|"))
# each alternative begins with a fixed character, which makes the search fast
_MARKED = re.compile(
    rf"<(?i:[^<>\s]{{1,24}}>\s?({_WORDS})(?=\s*[<\n:]):?"  # <|im_start|>user, </s>USER:
    rf"|[|\uff5c]?({_WORDS})[|\uff5c]?>:?|<(/?sys)>>)"  # <|user|>, <human>:, <<SYS>>
    rf"|\[(?i:(/?inst)|\|?({_WORDS})\|?)\]:?"  # [INST], [|Human|]
    rf"|\n(?i:[ \t>#*-]*({_WORDS})[ \t*]*:|\#+[ \t]*({_WORDS})[ \t]*(?=\n))"  # **User:**
    rf"|\ (?=[A-Z])({_TITLES}):|(?<!\#)\#{{1,6}} ?({_TITLES}):"  # in the middle of a line
)
_LABELLED = re.compile(
    r"^(?:\[[^\]\n]{1,30}\])?[ \t>#*-]*([^\W\d_][\w .'-]{0,24})[ \t*]*[:\uff1a]", re.MULTILINE
)
_MAY_BE_MARKED = re.compile(r"[<\[#:\uff1a]")
# special tokens at the beginning or end of a turn, which are not part of its text
_SPECIAL = re.compile(r"</?[|\uff5c][^<>\n]{1,40}>|<[^<>\n]{1,40}[|\uff5c]>|</?\w{1,13}>")


class Transcript(NamedTuple):
    """The chat in a text; `exchanges` is empty if the text is not a transcript."""

    exchanges: tuple[tuple[str, str], ...]  # questions and their answers, in order
    unanswered: str  # the last question, if it has no answer
    marked: bool  # by a common template; else a label before a colon may not be a speaker


def is_text(row: RawRow) -> bool:
    """Return whether a row is one ready-made text, which is both its prompt and its response."""
    return not row.messages and row.prompt in ("", row.response)


def transcript_of(row: RawRow) -> Transcript:
    """Return the exchanges of a row that is not a list of messages.

    In a ready-made text these are all of its exchanges. Else the context and the prompt may quote
    earlier ones, and the row's own response is not among them.
    """
    if is_text(row):
        return read_transcript(row.response, is_whole=True)
    quoted = read_transcript(row.context, is_whole=False)
    prompt = read_transcript(row.prompt, is_whole=False)
    unanswered = prompt.unanswered if quoted.exchanges else f"{prompt.unanswered} {row.context}"
    marked = quoted.marked or prompt.marked
    return Transcript((*quoted.exchanges, *prompt.exchanges), unanswered, marked)


def read_transcript(text: str, is_whole: bool) -> Transcript:
    """Return the exchanges of a text.

    Args:
        text: the text.
        is_whole: the text is all of its row, so that any label may name a speaker. A prompt is
            not: in it, an unknown label may as well be the name of a field.
    """
    if not _MAY_BE_MARKED.search(text):
        return Transcript((), text, marked=False)
    # line ends around the text, because some marks need one before or after them
    turns = [(_SIDES[name.casefold()], said) for name, said in _turns(f"\n{text}\n", _MARKED)]
    pairs: list[tuple[list[str], list[str]]] = []
    questions: list[str] = []
    last = ""
    for side, content in turns:
        if side == "assistant" and last == side:  # one answer in several turns
            if pairs:
                pairs[-1][1].append(content)
        elif side == "assistant" and questions:
            pairs.append((questions, [content]))
            questions = []
        elif side not in ("assistant", "system"):
            questions.append(content)
        last = side
    exchanges = [(" ".join(asked), " ".join(answers)) for asked, answers in pairs]
    if not exchanges and is_whole:  # speakers of unknown roles: each turn answers the one before
        contents = [content for _, content in _turns(text, _LABELLED)]
        exchanges = list(zip(contents, contents[1:], strict=False))
    unanswered = " ".join(questions) if turns else text
    return Transcript(tuple(exchanges), unanswered, marked=bool(pairs))


def _turns(text: str, mark: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Yield speaker and content of each turn; text before the first mark is ignored."""
    marks = list(mark.finditer(text))
    for following, match in enumerate(marks, 1):
        end = marks[following].start() if following < len(marks) else len(text)
        content = _SPECIAL.sub(" ", text[match.end() : end]).strip(" \n\r\t#*")
        if content:
            yield match[match.lastindex or 0], content
