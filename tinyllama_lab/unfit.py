"""Data sets that are no prompts and responses as they stand: what they are, and what to type.

`KINDS` is the table. A kind may overrule what the names of the columns seem to say: answers
that are numbers of choices look like answers, and one message a row looks like a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from tinyllama_lab.cells import plain, unpacked
from tinyllama_lab.columns import (
    CHATS,
    CONTEXTS,
    PROMPTS,
    RESPONSES,
    SYSTEMS,
    Columns,
    listed,
    quoted,
    settings,
    words_of,
)
from tinyllama_lab.errors import DataError, shown
from tinyllama_lab.turns import ROLES, is_chat, roles, turn_list

CHAT, PAIR, TEXT = "chat", "pair", "text"

_PREFERENCES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("preferred", "dispreferred"),
    ("response_j", "response_k"),  # the first is the better one
)
_RIVALS = re.compile(r"(.*(?:response|answer|completion|output|conversation|ref))[_ -]?(\d|[ab])")
_VERDICTS = ("label", "labels", "kto_tag")
_SPEAKERS = ("role", "from", "speaker", "sender", "user")
_SAYINGS = (TEXT, "content", "message", "value", "utterance")
_CHOICES = frozenset(
    "choice choices option options ending endings candidates distractor sol opa opb opc".split()
)
_INDEX = re.compile(r"\(?(?:[A-Za-z]|\d{1,2})[).]?")
_LABELS = frozenset(
    "label labels sentiment emotion emotions rating ratings toxic toxicity hate spam".split()
)
# beside a `text`, these mean that the text alone is not what is to be learned
_TARGETS = (
    *RESPONSES,
    *("target", "class", "category", "intent", "polarity", "stars"),
    *("summary", "highlights", "chosen", "code", "translation"),
)
_ANSWERS = frozenset((*RESPONSES, "summary", "highlights", "target", "label", "chosen"))
# columns that are about a row, and hold neither question nor answer
_ABOUT = frozenset(
    "id title source topic subject role path url lang language name method rejected".split()
)
_LONG_NAME = 40  # characters: longer ones are data, not names


class Kind(NamedTuple):
    """A kind of data set: how it is told, and which recognition it overrules."""

    told: Callable[[Columns], str]  # what is wrong and what to do; empty for any other set
    overrules: tuple[str, ...] = ()


def unfit(columns: Columns, recognised: str) -> DataError | None:
    """Why a set that is recognised as `CHAT`, `PAIR` or `TEXT` by its names is none."""
    kinds = (kind.told(columns) for kind in KINDS if recognised in kind.overrules)
    told = next(filter(None, kinds), "")
    return DataError(told) if told else None


def refusal(columns: Columns) -> DataError:
    """Why nothing was recognised: the kind of the set, or its columns and what to type."""
    told = next(filter(None, (kind.told(columns) for kind in KINDS)), "")
    return DataError(told or _unknown(columns))


# ---- the kinds -----------------------------------------------------------------------------


def _feedback(columns: Columns) -> str:
    """KTO: an answer, and whether it is good."""
    for name in columns.named(_VERDICTS):
        if columns.mostly(name, _is_boolean) and columns.named((*RESPONSES, *CHATS)):
            return (
                f"every row must be an answer to learn, got feedback on answers (column "
                f"{quoted(name)} says whether one is good); keep the rows where it is true, and "
                "remove the column"
            )
    return ""


def _preference(columns: Columns) -> str:
    """A better and a worse answer in each row."""
    there = {name.strip().casefold(): name for name in columns.free}
    for good, bad in _PREFERENCES:
        if good in there and bad in there and columns.is_text(there[good]):
            got = (
                f"every row must be an answer to learn, got preference data (column "
                f"{quoted(there[good])} is preferred to {quoted(there[bad])}); "
            )
            typed = _preferred(columns, there[good])
            what = "transcripts" if "columns.text" in typed else "answers"
            way_out = (
                f"type {settings(typed)}"
                if typed
                else f"write what was asked and {quoted(there[good])} as one list 'messages' "
                "in each row"
            )
            return f"{got}to train on the preferred {what} alone, {way_out}"
    return ""


def _preferred(columns: Columns, good: str) -> dict[str, str]:
    """What to type to train on the preferred answers; nothing where no column asks."""
    style = {} if columns.style == "chat" else {"style": "chat"}
    if columns.mostly(good, is_chat) and columns.mostly(good, _is_asked):
        return {"columns.messages": good, **style}
    prompts = [name for name in columns.named(PROMPTS) if columns.is_text(name)]
    if prompts:
        pair = {"columns.prompt": prompts[0], "columns.response": good}
        systems = [name for name in columns.named(SYSTEMS) if columns.is_text(name)]
        return {**pair, **({"columns.system": systems[0]} if systems and not style else {})}
    if columns.mostly(good, is_chat):
        return {}
    return {"columns.text": good, "style": "text"}  # whole transcripts


def _rivals(columns: Columns) -> str:
    """Several answers in each row, of which one is to be chosen."""
    found = [(_RIVALS.fullmatch(name.strip().casefold()), name) for name in columns.free]
    stems = [(match[1], name) for match, name in found if match and columns.is_text(name)]
    for (stem, first), (other, second) in pairwise(stems):
        if stem == other:
            return (
                f"every row must be an answer to learn, got several to choose from "
                f"({quoted(first)} and {quoted(second)}); write the better one of each row into "
                "a column of its own, such as response"
            )
    return ""


def _single_messages(columns: Columns) -> str:
    """One message of a conversation in each row."""
    said = [name for name in columns.named(_SAYINGS) if columns.is_text(name)]
    speakers = [name for name in columns.named(_SPEAKERS) if columns.is_text(name)]
    trees = [name for name in columns.free if {"parent", "id"} <= words_of(name)]
    if not said or not (speakers or trees):
        return ""
    return (
        f"every row must be a whole conversation, got one message in each (column "
        f"{quoted(said[0])} beside {quoted((speakers or trees)[0])}); write the messages of each "
        'conversation into one row, as {"messages": [{"role": "user", "content": "..."}, ...]}; '
        f"to learn the texts alone, type "
        f"{settings({'columns.text': said[0], 'style': 'text'})}"
    )


def _history(columns: Columns) -> str:
    """An answer to earlier turns, which stand in a column of their own."""
    for name in columns.named(("history",)):
        if any(isinstance(cell, list | tuple) and len(cell) for cell in columns.cells(name)):
            return (
                f"every row must be a whole conversation, got earlier turns apart from the last "
                f"(column {quoted(name)}); write both as one list 'messages' in each row"
            )
    return ""


def _multiple_choice(columns: Columns) -> str:
    """A question, its choices, and the number or letter of the right one."""
    answers = columns.named(RESPONSES)
    choices = columns.with_word(_CHOICES)
    is_plain = bool(answers) or len(choices) > 1
    choices = [name for name in choices if is_plain or columns.mostly(name, _has_parts)]
    choices = choices or columns.named(("a", "b", "c", "d"))
    if not choices or not all(columns.mostly(name, _is_index) for name in answers):
        return ""
    if not answers and not columns.named((*PROMPTS, "question_stem", "ctx", "goal", "sentence")):
        return ""
    right = f"; an answer such as {_first(columns, answers[0])} says nothing" if answers else ""
    return (
        f"every row must be an answer to learn, got multiple choice (choices in "
        f"{listed(choices)}){right}; write each question with its choices into a column prompt, "
        "and the text of the right choice into a column response"
    )


def _labelled(columns: Columns) -> str:
    """A text, and what is to be told of it."""
    texts = [name for name in columns.named((TEXT,)) if columns.is_text(name)]
    prose = [name for name in _sayings(columns) if not words_of(name) & _LABELS]
    texts = texts or (prose if len(prose) == 1 and prose != columns.named(PROMPTS) else [])
    found = [*columns.with_word(_LABELS), *columns.named(_TARGETS)]
    labels = [name for name in found if name not in (*texts, *columns.given.values())]
    if not texts or not labels:
        return ""
    alone = settings({"columns.text": texts[0], "style": "text"})
    got = (
        f"ready-made text must stand alone, got {quoted(texts[0])} beside {quoted(labels[0])}, "
        f"which may be what is to be learned; to learn the texts alone, type {alone}"
    )
    if not columns.is_text(labels[0]):
        return got
    pair = settings({"columns.prompt": texts[0], "columns.response": labels[0]})
    number = f", whose numbers such as {_first(columns, labels[0])} you should write out first"
    hint = number if columns.mostly(labels[0], _is_index) else ""
    return f"{got}; to learn {quoted(labels[0])} from them{hint}, type {pair}"


def _strangers(columns: Columns) -> str:
    """Messages by roles that are not known."""
    found = {r for name in columns.names for cell in columns.cells(name) for r in roles(cell)}
    if not found or _guess(columns):
        return ""
    return (
        "messages must be by system, user, assistant or tool, or by a usual name for these such "
        f"as human or gpt, got {listed(sorted(found))}; rename the roles"
    )


def _no_messages(columns: Columns) -> str:
    """A column with the name of a chat, and lists of something else."""
    for name in columns.named(CHATS):
        lists = [turn_list(cell) for cell in columns.cells(name)]
        first = next(filter(None, lists), None)
        if columns.mostly(name, _is_unreadable_list):
            return (
                f"data.columns.messages must hold lists of messages, got text in {quoted(name)} "
                "that is no list in JSON or Python; write the set as JSON lines or Parquet"
            )
        if columns.mostly(name, is_chat) or first is None:
            continue
        inner, way_out = (
            "objects without a role and a content",
            "name who speaks, and what is said",
        )
        if isinstance(first[0], list | tuple):
            inner, way_out = "lists", "write each conversation into a row of its own"
        elif isinstance(first[0], str):
            inner, way_out = "texts without a role", "write who speaks"
        return (
            f"data.columns.messages must hold lists of messages, got lists of {inner} in "
            f'{quoted(name)}; {way_out}, as [{{"role": "user", "content": "..."}}, ...]'
        )
    return ""


def _no_text(columns: Columns) -> str:
    """A prompt or a response that is an object or a list."""
    for key, spellings in (("prompt", PROMPTS), ("response", RESPONSES)):
        for name in columns.named(spellings):
            if columns.mostly(name, _has_parts) and not columns.is_text(name):
                return (
                    f"data.columns.{key} must hold text, got objects or lists in {quoted(name)}, "
                    f"such as {_first(columns, name)}; store each as the text that is to be "
                    "learned, for example with json.dumps"
                )
    return ""


def _parts(columns: Columns) -> str:
    """Texts that stand within objects or lists."""
    parts = [name for name in columns.free if columns.mostly(name, _has_parts)]
    is_chat_there = any(columns.mostly(name, is_chat) for name in parts)
    if not parts or is_chat_there or len(_sayings(columns)) > 1:
        return ""
    return (
        f"data.columns must say which columns hold the prompt and the response, got objects or "
        f"lists in {listed(parts)}, such as {_first(columns, parts[0])}; write the texts in them "
        "into columns of their own, such as prompt and response"
    )


KINDS = (
    Kind(_feedback, overrules=(CHAT, PAIR)),
    Kind(_preference),
    Kind(_rivals),
    Kind(_single_messages, overrules=(TEXT,)),
    Kind(_history, overrules=(PAIR,)),
    Kind(_multiple_choice, overrules=(PAIR,)),
    Kind(_strangers),
    Kind(_no_messages),
    Kind(_no_text),
    Kind(_labelled, overrules=(TEXT,)),
    Kind(_parts),
)

# ---- any other set -------------------------------------------------------------------------


def _unknown(columns: Columns) -> str:
    """The columns that are there with their first cells, and what to type."""
    typed = settings(_guess(columns))
    way_out = "name two of these in data.columns.prompt=... and data.columns.response=..."
    data = [name for name in columns.names if _is_data(name) or name in columns.cells(name)]
    if 2 * len(data) >= len(columns.names):
        way_out = (
            "the first line of the file seems to hold data: write a line with the names of "
            "the columns above it, such as prompt,response"
        )
    elif typed:
        way_out = f"for example, type {typed}"
    cells = {name: columns.cells(name) for name in columns.names}
    firsts = [f"{n} ({shown(str(c[0]), 30)!r})" if c else n for n, c in cells.items()]
    what = "the messages, the prompt and the response, or the text"
    return (
        f"data.columns must say which columns hold {what}, got a set with the columns: "
        f"{listed(firsts)}, whose names do not say it plainly; {way_out}"
    )


def _guess(columns: Columns) -> dict[str, str]:
    """The likeliest columns, for the user to correct."""
    chats = [name for name in columns.free if columns.mostly(name, is_chat)]
    if chats and not columns.has_typed_part:
        is_chat_style = columns.style == "chat"
        return {"columns.messages": chats[0], **({} if is_chat_style else {"style": "chat"})}
    texts = _sayings(columns)
    if len(texts) == 1 and (columns.style == TEXT or not columns.has_typed_part):
        is_question = columns.named(PROMPTS) == texts and columns.style != TEXT
        return {} if is_question else {"columns.text": texts[0], "style": "text"}
    if columns.style == TEXT:
        return {}
    guess: dict[str, str] = {}
    texts.sort(key=lambda name: bool(words_of(name) & _ANSWERS))  # no prompt where others are
    for key, words in (("prompt", frozenset(PROMPTS)), ("response", _ANSWERS)):
        left = [name for name in texts if name not in guess.values()]
        likely = [*columns.named(tuple(words)), *columns.with_word(words), *left]
        names = [name for name in likely if name in left]
        if key not in columns.given and names:
            guess[f"columns.{key}"] = names[0]
    return guess


def _sayings(columns: Columns) -> list[str]:
    """The columns that may be a question, an answer or a text."""
    about = {*SYSTEMS, *CONTEXTS}
    return [
        name
        for name in columns.free
        if columns.is_prose(name)
        and not words_of(name) & _ABOUT
        and name.strip().casefold() not in about
    ]


def _first(columns: Columns, name: str) -> str:
    return repr(shown(str(plain(columns.cells(name)[0])), 40))


def _is_boolean(cell: Any) -> bool:
    return str(plain(cell)).strip().casefold() in ("true", "false")


def _is_asked(cell: Any) -> bool:
    """Whether a user speaks in a chat."""
    said = (str(m.get("role", m.get("from", ""))) for m in turn_list(cell) or ())
    return any(ROLES.get(name.casefold()) == "user" for name in said)


def _is_index(cell: Any) -> bool:
    return bool(_INDEX.fullmatch(str(plain(cell)).strip()))


def _is_unreadable_list(cell: Any) -> bool:
    return isinstance(cell, str) and cell.startswith("[{") and isinstance(unpacked(cell), str)


def _has_parts(cell: Any) -> bool:
    return isinstance(unpacked(cell), list | tuple | Mapping)


def _is_data(name: str) -> bool:
    """Whether the name of a column looks like a cell: a sentence."""
    is_sentence = name.strip().endswith(("?", ".", "!")) and len(name.split()) > 2
    return len(name) > _LONG_NAME or is_sentence
