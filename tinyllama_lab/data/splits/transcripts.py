"""Chats that are written out as one text: what was asked in it, and what was answered.

The marks of the usual templates are known: `<|im_start|>user`, `<|user|>`, `[INST]`,
`### Instruction:`, `User:`, `Q:`. Where a text has none of them, whatever stands before a colon at
the beginning of a line says who speaks (`Customer: ...`).
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
# each way begins with one character, by which the search finds its places fast
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
# what closes a turn, or opens one, and is no text of it
_SPECIAL = re.compile(r"</?[|\uff5c][^<>\n]{1,40}>|<[^<>\n]{1,40}[|\uff5c]>|</?\w{1,13}>")


class Transcript(NamedTuple):
    """What a text says of a chat; no exchanges where it is none."""

    exchanges: tuple[tuple[str, str], ...]  # what was asked and what was answered, in order
    rest: str  # what was asked last, and not answered
    marked: bool  # by a usual template; else what stands before a colon may be no speaker


def is_text(row: RawRow) -> bool:
    """Whether a row is one ready-made text: its own prompt and its own response."""
    return not row.messages and row.prompt in ("", row.response)


def transcript_of(row: RawRow) -> Transcript:
    """The exchanges of a row that is no list of messages, those of its last answer left out.

    Of a ready-made text they are all in it; else a prompt or a context may quote them.
    """
    if is_text(row):
        return read_transcript(row.response, is_whole=True)
    quoted = read_transcript(row.context, is_whole=False)
    asked = read_transcript(row.prompt, is_whole=False)
    rest = asked.rest if quoted.exchanges else f"{asked.rest} {row.context}"
    marked = quoted.marked or asked.marked
    return Transcript((*quoted.exchanges, *asked.exchanges), rest, marked)


def read_transcript(text: str, is_whole: bool) -> Transcript:
    """The exchanges of a text.

    Args:
        is_whole: the text is a row's all. Else it is a prompt, in which a label that is no usual
            one may as well be the name of a field.
    """
    if not _MAY_BE_MARKED.search(text):
        return Transcript((), text, marked=False)
    pieces = [(_SIDES[name.casefold()], said) for name, said in _pieces(f"\n{text}\n", _MARKED)]
    turns: list[tuple[list[str], list[str]]] = []
    asked: list[str] = []
    last = ""
    for side, said in pieces:
        if side == "assistant" and last == side:
            if turns:
                turns[-1][1].append(said)
        elif side == "assistant" and asked:
            turns.append((asked, [said]))
            asked = []
        elif side not in ("assistant", "system"):
            asked.append(said)
        last = side
    found = [(" ".join(questions), " ".join(answers)) for questions, answers in turns]
    if not found and is_whole:
        spoken = [said for _, said in _pieces(text, _LABELLED)]
        found = list(zip(spoken, spoken[1:], strict=False))
    return Transcript(tuple(found), " ".join(asked) if pieces else text, marked=bool(turns))


def _pieces(text: str, mark: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Who speaks, and what; what stands before the first mark is nobody's."""
    marks = list(mark.finditer(text))
    for place, each in enumerate(marks, 1):
        end = marks[place].start() if place < len(marks) else len(text)
        said = _SPECIAL.sub(" ", text[each.end() : end]).strip(" \n\r\t#*")
        if said:
            yield each[each.lastindex or 0], said
