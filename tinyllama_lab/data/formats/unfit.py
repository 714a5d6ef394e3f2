"""Data sets that do not hold prompts and responses as they stand: what they are, and what to type.

`KINDS` lists them; those that judge text are in `judged.py`. A kind may overrule what the names of
the columns suggest. For example, the numbers of choices look like answers, and single messages
look like ready-made text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tinyllama_lab.data.formats.cells import MEDIA, holds_media, is_list_or_object, parsed_cell
from tinyllama_lab.data.formats.columns import (
    CHATS,
    CONTEXTS,
    PROMPTS,
    RESPONSES,
    Columns,
    listed,
    quoted,
    settings,
    words_of,
)
from tinyllama_lab.data.formats.exports import chatgpt, single_messages, unknown_speakers
from tinyllama_lab.data.formats.judged import (
    candidate_answers,
    feedback,
    labelled,
    multiple_choice,
    preference,
)
from tinyllama_lab.data.formats.parts import is_list_of_parts
from tinyllama_lab.data.formats.turns import is_chat, turn_list
from tinyllama_lab.errors import DataError, shown

CHAT, PAIR, TEXT = "chat", "pair", "text"
LISTS = "lists"  # chats in a column whose name does not say so

_RESPONSE_WORDS = frozenset((*RESPONSES, "summary", "highlights", "target", "label", "chosen"))
_LIKELY_RESPONSES = _RESPONSE_WORDS | {"sql", "code"}
_ROW_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, ...]}'
_MAX_NAME_LENGTH = 40  # characters; a longer name is probably a cell


class Kind(NamedTuple):
    """A kind of data set that cannot be trained on as it stands.

    Attributes:
        describe: returns what is wrong and what to do; an empty string for any other set.
        overrules: the recognitions, such as `PAIR`, that this kind overrules.
        adds_settings: whether the message also says what to type to train on the columns as they
            are. It is false if `describe` says so itself, or if the columns hold no text.
        purpose: what those settings are for.
    """

    describe: Callable[[Columns], str]
    overrules: tuple[str, ...] = ()
    adds_settings: bool = True
    purpose: str = "to train on the columns as they are"


def unfit(columns: Columns, recognised: str, names: Mapping[str, str]) -> DataError | None:
    """Return why a set that was recognised is unfit all the same.

    Args:
        recognised: `CHAT`, `PAIR`, `TEXT` or `LISTS`.
        names: the recognised columns, by their key in `data.columns`.

    Returns:
        The error; None if the set is fit.
    """
    style = {"style": "text"} if recognised == TEXT else {}
    typed = {**{f"columns.{key}": name for key, name in names.items()}, **style}
    kinds = [kind for kind in KINDS if recognised in kind.overrules]
    problem = _first_problem(columns, kinds, typed)
    return DataError(problem) if problem else None


def refusal(columns: Columns) -> DataError:
    """Return why nothing was recognised: the kind of the set, or else its columns."""
    problem = _first_problem(columns, KINDS, _likely_settings(columns))
    return DataError(problem or _unknown(columns))


def with_media(columns: Columns) -> str:
    """Return the first column that holds images, audio or video; empty if none does."""
    names = columns.with_word(MEDIA)
    return next((n for n in names if any(map(holds_media, columns.all_cells(n)))), "")


def _first_problem(columns: Columns, kinds: Sequence[Kind], typed: Mapping[str, str]) -> str:
    """Return the description by the first of these kinds that matches; empty if none does.

    Args:
        typed: the settings that train on the columns as they are.
    """
    problems = ((kind, problem) for kind in kinds if (problem := kind.describe(columns)))
    kind, problem = next(problems, (None, ""))
    if kind is None or not kind.adds_settings or not typed:
        return problem
    return f"{problem}; {kind.purpose}, type {settings(typed)}"


# ---- the kinds -----------------------------------------------------------------------------


def _media(columns: Columns) -> str:
    """Describe text about an image, audio or video in a column of its own."""
    media = with_media(columns)
    return media and (
        f"every row must be text alone, got images, audio or video in {quoted(media)}, which the "
        "text may be about; keep the rows without any, and remove the column"
    )


def _unanswered(columns: Columns) -> str:
    """Describe chats that end before the answer, which may be in one of several columns."""
    candidates = columns.with_name(CHATS) or columns.chats
    chats = next(filter(columns.holds_unanswered, candidates), "")
    if not chats or len(columns.answer_columns(chats)) == 1:
        return ""
    if not (answers := columns.answer_columns(chats) or columns.likely_answer_columns):
        return preference(columns) or candidate_answers(columns)
    pairs = [
        {"columns.prompt": chats, "columns.response": n} for n in answers if columns.is_text(n)
    ]
    ways = [f"to train on it, type {' or type '.join(map(settings, pairs))}"] if pairs else []
    earlier_only = settings({"columns.messages": chats})
    earlier = f"to train on the earlier answers alone, type {earlier_only}"
    return (
        f"every row must hold the answer to train on, got chats in {quoted(chats)} that end "
        f"before it, and {listed(answers)}, which may hold it; "
        f"{'; '.join([earlier, *ways] if ways else ['store it as text', earlier])}"
    )


def _history(columns: Columns) -> str:
    """Describe a conversation whose earlier turns are in a column of their own."""
    text_columns = columns.with_name((*PROMPTS, *RESPONSES)) or columns.prose_columns()
    for name in columns.with_name(("history",)):
        if columns.chats == [name] and not columns.with_name(RESPONSES):
            continue  # the column holds whole conversations
        lists = [cell for cell in columns.cells(name) if isinstance(cell, list | tuple) and cell]
        if lists and not (text_columns or columns.is_pair_configured):
            if isinstance(lists[0][0], str):
                return (
                    f"every message must say who speaks, got lists of texts in {quoted(name)}; "
                    f"write each row as {_ROW_EXAMPLE}"
                )
            continue
        if lists:
            return (
                f"every row must be a whole conversation, got earlier turns apart from the last "
                f"(column {quoted(name)}); write both as one list 'messages' in each row: first "
                f"those of {quoted(name)}{_last_turns(columns)}"
            )
    return ""


def _last_turns(columns: Columns) -> str:
    """Return which columns are the last turns of a conversation, for a message."""
    configured = columns.configured
    prompts = [
        configured.get("prompt"),
        *columns.with_name((*PROMPTS, *CONTEXTS)),
        configured.get("context"),
    ]
    answers = [configured.get("response"), *columns.with_name(RESPONSES)]
    turns = ""
    if questions := [quoted(column) for column in prompts if column]:
        together = " together" * (len(questions) > 1)
        turns = f", then {' and '.join(questions)}{together} as the last user turn"
    if answer := next(filter(None, answers), None):
        turns += f", then {quoted(answer)} as the last assistant turn"
    return turns or ", then the last turns"


def _no_messages(columns: Columns) -> str:
    """Describe a column with the name of a chat that holds lists of something else."""
    for name in columns.with_name(CHATS):
        lists = [turn_list(cell) for cell in columns.cells(name)]
        first = next(filter(None, lists), None)
        if columns.mostly(name, _is_unreadable_list):
            return (
                f"data.columns.messages must hold lists of messages, got text in {quoted(name)} "
                "that is not a JSON or Python list; write the set as JSON lines or Parquet"
            )
        if columns.mostly(name, is_chat) or first is None:
            continue
        inner, way_out = (
            "objects without a role and a content",
            "give each message a role and a content",
        )
        if isinstance(first[0], list | tuple):
            inner, way_out = "lists", "write each conversation into a row of its own"
        elif isinstance(first[0], str):
            inner, way_out = "texts without a role", "give each message a role"
        return (
            f"data.columns.messages must hold lists of messages, got lists of {inner} in "
            f'{quoted(name)}; {way_out}, as [{{"role": "user", "content": "..."}}, ...]'
        )
    return ""


def _no_text(columns: Columns) -> str:
    """Describe a prompt or a response that is an object or a list."""
    for key, spellings in (("prompt", PROMPTS), ("response", RESPONSES)):
        for name in columns.with_name(spellings):
            if columns.mostly(name, is_list_or_object) and not columns.is_text(name):
                is_message = columns.mostly(name, is_list_of_parts)
                way_out = (
                    f"join the texts of the parts of each, or write each row as {_ROW_EXAMPLE}"
                    if is_message
                    else "store each as text, for example with json.dumps"
                )
                return (
                    f"data.columns.{key} must hold text, got objects or lists in {quoted(name)}, "
                    f"such as {columns.first_cell(name)}; {way_out}"
                )
    return ""


def _nested(columns: Columns) -> str:
    """Describe several chats in the objects of columns, or a single one without answers."""
    paths = [] if columns.is_pair_configured else columns.nested_chats
    if len(paths) == 1 and columns.holds_unanswered(paths[0]):
        return (
            f"every row must hold the answer to train on, got chats in {quoted(paths[0])} that "
            f"end before it; write each with its answer as the last message, as {_ROW_EXAMPLE}"
        )
    if len(paths) < 2 or columns.style != "chat":
        return ""
    ways = " or ".join(settings({"columns.messages": path}) for path in paths)
    return (
        f"data.columns.messages must name one list of messages, got several within objects: "
        f"{listed(paths)}; type {ways}"
    )


def _parts(columns: Columns) -> str:
    """Describe texts within objects or lists."""
    parts = [name for name in columns.available if columns.mostly(name, is_list_or_object)]
    if not parts or columns.chats or columns.nested_chats or len(columns.prose_columns()) > 1:
        return ""
    parts.sort(key=lambda name: -sum(len(str(cell)) for cell in columns.cells(name)))
    return (
        f"data.columns must say which columns hold the prompt and the response, got objects or "
        f"lists in {listed(parts)}, such as {columns.first_cell(parts[0])}; write the texts in "
        "them into columns of their own, such as prompt and response"
    )


# the first kind that describes a set wins, so specific kinds come before general ones
KINDS = (
    Kind(feedback, overrules=(CHAT, PAIR, LISTS)),
    Kind(_media, overrules=(CHAT, PAIR, TEXT, LISTS)),
    Kind(preference, overrules=(LISTS,), adds_settings=False),
    Kind(candidate_answers, overrules=(LISTS,), adds_settings=False),
    Kind(_unanswered, overrules=(CHAT, LISTS), adds_settings=False),
    Kind(chatgpt, adds_settings=False),
    Kind(single_messages, overrules=(TEXT,), adds_settings=False),
    Kind(
        _history,
        overrules=(PAIR, LISTS),
        purpose="to train on the other columns alone, without the earlier turns",
    ),
    Kind(multiple_choice, overrules=(PAIR,)),
    Kind(unknown_speakers, adds_settings=False),
    Kind(_nested, adds_settings=False),
    Kind(_no_messages, adds_settings=False),
    Kind(_no_text, adds_settings=False),
    Kind(labelled, overrules=(TEXT,), adds_settings=False),
    Kind(_parts, adds_settings=False),
)

# ---- any other set -------------------------------------------------------------------------


def _unknown(columns: Columns) -> str:
    """Return a message with the columns, their first cells, and what to type."""
    typed = settings(_likely_settings(columns))
    way_out = "name two of these in data.columns.prompt=... and data.columns.response=..."
    way_out = f"for example, type {typed}" if typed else way_out
    # a CSV file without a header: half of the names look like cells, or also occur as cells
    data = [name for name in columns.names if _is_data(name) or name in columns.cells(name)]
    if 2 * len(data) >= len(columns.names):
        way_out = (
            "the first line of the file seems to hold data: if it does, add a line with the names "
            "of the columns above it, such as prompt,response; if it holds the names, "
            f"{way_out}"
        )
    cells = {name: columns.cells(name) for name in columns.names}
    firsts = [f"{n} ({shown(str(c[0]), 30)!r})" if c else n for n, c in cells.items()]
    kinds = "the messages, the prompt and the response, or the text"
    return (
        f"data.columns must say which columns hold {kinds}, got a set with the columns: "
        f"{listed(firsts)}, whose names do not identify them; {way_out}"
    )


def _likely_settings(columns: Columns) -> dict[str, str]:
    """Return settings that name the likeliest columns, for the user to correct."""
    if (chats := columns.chats or columns.nested_chats) and not columns.is_pair_configured:
        is_chat_style = columns.style == "chat"
        return {"columns.messages": chats[0], **({} if is_chat_style else {"style": "chat"})}
    texts = columns.prose_columns()
    if len(texts) == 1 and (columns.style == TEXT or not columns.is_pair_configured):
        is_question = columns.with_name(PROMPTS) == texts and columns.style != TEXT
        return {} if is_question else {"columns.text": texts[0], "style": "text"}
    if columns.style == TEXT:
        return {}
    guess: dict[str, str] = {}
    # a column that looks like a response is the prompt only where no other column is left
    texts.sort(key=lambda name: bool(words_of(name) & _LIKELY_RESPONSES))
    for key, words in (("prompt", frozenset(PROMPTS)), ("response", _LIKELY_RESPONSES)):
        left = [name for name in texts if name not in guess.values()]
        likely = [*columns.with_name(tuple(words)), *columns.with_word(words), *left]
        names = [name for name in likely if name in left]
        if key == "response":  # a column with such a name may hold numbers or categories
            names = [*filter(columns.is_text, columns.with_name(RESPONSES)), *names]
        if key not in columns.configured and names:
            guess[f"columns.{key}"] = names[0]
    return guess


def _is_unreadable_list(cell: Any) -> bool:
    """Return whether a string begins like a list of objects, and cannot be parsed."""
    return isinstance(cell, str) and cell.startswith("[{") and isinstance(parsed_cell(cell), str)


def _is_data(name: str) -> bool:
    """Return whether the name of a column looks like a cell: it is long, or a sentence."""
    is_sentence = name.strip().endswith(("?", ".", "!")) and len(name.split()) > 2
    return len(name) > _MAX_NAME_LENGTH or is_sentence
