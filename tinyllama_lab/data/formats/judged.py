"""Sets that judge text: feedback on answers, preferences, multiple choice, and labels.

Each public function describes one kind for an error message: what is wrong and what to do. It
returns an empty string for any other set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tinyllama_lab.data.formats.cells import (
    has_true_and_false,
    is_list_or_object,
    is_number_or_bool,
    to_python,
)
from tinyllama_lab.data.formats.columns import (
    CHATS,
    PROMPTS,
    RESPONSES,
    SYSTEMS,
    Columns,
    listed,
    quoted,
    settings,
    words_of,
)
from tinyllama_lab.data.formats.turns import ROLES, is_chat, turn_list

_PREFERENCE_PAIRS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("preferred", "dispreferred"),
    ("response_j", "response_k"),  # Stack Exchange: `j` is the better one
)
_NUMBERED = re.compile(
    r"(.*(?:response|answer|completion|output|conversation|ref))[_ -]?(\d|[ab])"
)
_VERDICT_NAMES = ("label", "labels", "kto_tag")
_CHOICE_WORDS = frozenset(
    "choice choices option options ending endings candidates distractor sol opa opb opc".split()
)
_LETTER = re.compile(r"\(?[A-Ja-j][).]?")
_NUMBER = re.compile(r"\(?\d{1,2}[).]?")
_LABEL_WORDS = frozenset(
    "label labels sentiment emotion emotions rating ratings toxic toxicity hate spam".split()
)
# a column of one of these names next to `text` may be the target of the text
_TARGET_NAMES = (
    *RESPONSES,
    *("target", "class", "category", "intent", "polarity", "stars"),
    *("summary", "highlights", "chosen", "code", "translation"),
)
_MAX_GRADES = 20  # numbers with more values are measurements, not labels


def feedback(columns: Columns) -> str:
    """Describe feedback data: an answer, and whether it is good (KTO)."""
    for name in columns.with_name(_VERDICT_NAMES):
        # a label that is always true, or always false, selects nothing
        is_verdict = columns.mostly(name, _is_boolean) and has_true_and_false(
            columns.all_cells(name)
        )
        if is_verdict and (columns.with_name((*RESPONSES, *CHATS)) or columns.chats):
            return (
                f"every row must be an answer to train on, got feedback on answers (column "
                f"{quoted(name)} says whether one is good); keep the rows where it is true, and "
                "remove the column"
            )
    return ""


def preference(columns: Columns) -> str:
    """Describe preference data: a better and a worse answer in each row."""
    by_name = {name.strip().casefold(): name for name in columns.available}
    for good, bad in _PREFERENCE_PAIRS:
        chosen, rejected = by_name.get(good), by_name.get(bad)
        if chosen and rejected and columns.is_text(chosen):
            got = (
                f"every row must be an answer to train on, got preference data (column "
                f"{quoted(chosen)} is preferred to {quoted(rejected)}); "
            )
            typed = _preferred_settings(columns, chosen)
            texts = "transcripts" if "columns.text" in typed else "answers"
            way_out = (
                f"type {settings(typed)}"
                if typed
                else f"write what was asked and {quoted(chosen)} as one list 'messages' in "
                "each row"
            )
            return f"{got}to train on the preferred {texts} alone, {way_out}"
    return ""


def _preferred_settings(columns: Columns, good: str) -> dict[str, str]:
    """Return the settings that train on the preferred answers.

    Args:
        good: the column of the preferred answers.

    Returns:
        The settings; none if no column holds what was asked.
    """
    style = {} if columns.style == "chat" else {"style": "chat"}
    if columns.mostly(good, is_chat) and columns.mostly(good, _has_user_turn):
        return {"columns.messages": good, **style}
    prompts = [name for name in columns.with_name(PROMPTS) if columns.is_text(name)]
    if prompts := [n for n in columns.with_name(CHATS) if columns.holds_unanswered(n)] or prompts:
        pair = {"columns.prompt": prompts[0], "columns.response": good}
        systems = [name for name in columns.with_name(SYSTEMS) if columns.is_text(name)]
        return {**pair, **({"columns.system": systems[0]} if systems and not style else {})}
    if columns.mostly(good, is_chat):
        return {}
    return {"columns.text": good, "style": "text"}  # transcripts that hold the question as well


def candidate_answers(columns: Columns) -> str:
    """Describe a set with several answers in each row, one of which is to be chosen."""
    matches = [(_NUMBERED.fullmatch(name.strip().casefold()), name) for name in columns.available]
    stems = [(match[1], name) for match, name in matches if match and columns.is_text(name)]
    for (stem, first), (other, second) in pairwise(stems):
        if stem == other:
            return (
                f"every row must be an answer to train on, got several to choose from "
                f"({quoted(first)} and {quoted(second)}); write the better one of each row into "
                f"a column of its own, such as response{_as_it_is(columns, first, second)}"
            )
    return ""


def _as_it_is(columns: Columns, name: str, other: str) -> str:
    """Return what to type to train on `name`, one of two answers; empty without a question."""
    prompts = [column for column in columns.prose_columns() if column not in (name, other)]
    if prompts:
        typed = {"columns.prompt": prompts[0], "columns.response": name}
    elif columns.mostly(name, is_chat):
        typed = {
            "columns.messages": name,
            **({} if columns.style == "chat" else {"style": "chat"}),
        }
    else:
        return ""
    return f"; to train on {quoted(name)} as it is, type {settings(typed)}"


def multiple_choice(columns: Columns) -> str:
    """Describe multiple choice: a question, its choices, and the number or letter of one."""
    answers = columns.with_name(RESPONSES)
    choices = _choices(columns, answers)
    if not choices or not all(columns.mostly(name, _is_index) for name in answers):
        return ""
    if not answers and not columns.with_name(
        (*PROMPTS, "question_stem", "ctx", "goal", "sentence")
    ):
        return ""
    right = f"; an answer such as {columns.first_cell(answers[0])} says nothing" if answers else ""
    return (
        f"every row must be an answer to train on, got multiple choice (choices in "
        f"{listed(choices)}){right}; write each question with its choices into a column prompt, "
        "and the text of the right choice into a column response"
    )


def _choices(columns: Columns, answers: Sequence[str]) -> list[str]:
    """Return the columns that seem to hold the choices."""
    choices = [name for name in columns.with_word(_CHOICE_WORDS) if columns.cells(name)]
    if len(choices) == 1:  # a single column holds all choices
        has_all = columns.mostly(choices[0], is_list_or_object)
        is_list = answers and not columns.mostly(choices[0], is_number_or_bool)
        choices = choices if has_all or is_list else []
    if choices:
        return choices
    lettered = [name for name in columns.with_name(("a", "b", "c", "d")) if columns.is_text(name)]
    texts = [name for name in lettered if not columns.mostly(name, is_number_or_bool)]
    # without a letter as the answer, columns `a` and `b` of numbers are operands of a sum
    is_letter = answers and all(columns.mostly(name, _is_letter) for name in answers)
    return lettered if len(lettered if is_letter else texts) > 1 else []


def labelled(columns: Columns) -> str:
    """Describe text next to a label, a summary or code, which may be the target."""
    texts = [name for name in columns.with_name(("text",)) if columns.is_text(name)]
    prose = [name for name in columns.prose_columns() if not words_of(name) & _LABEL_WORDS]
    texts = texts or (prose if len(prose) == 1 and prose != columns.with_name(PROMPTS) else [])
    candidates = [*columns.with_word(_LABEL_WORDS), *columns.with_name(_TARGET_NAMES)]
    known = (*texts, *columns.configured.values())
    labels = [name for name in candidates if name not in known and _is_target(columns, name)]
    if not texts or not labels:
        return ""
    alone = settings({"columns.text": texts[0], "style": "text"})
    got = (
        f"ready-made text must stand alone, got {quoted(texts[0])} next to {quoted(labels[0])}, "
        f"which may be the target; to train on the texts alone, type {alone}"
    )
    if not columns.is_text(labels[0]):
        return got
    pair = settings({"columns.prompt": texts[0], "columns.response": labels[0]})
    first = columns.first_cell(labels[0])
    index = f"first write numbers or letters such as {first} out in words, then "
    hint = index if columns.mostly(labels[0], _is_index) else ""
    return f"{got}; to predict {quoted(labels[0])} from them, {hint}type {pair}"


def _is_boolean(cell: Any) -> bool:
    return str(to_python(cell)).strip().casefold() in ("true", "false")


def _has_user_turn(cell: Any) -> bool:
    """Return whether a user speaks in a chat."""
    speakers = (str(m.get("role", m.get("from", ""))) for m in turn_list(cell) or ())
    return any(ROLES.get(name.casefold()) == "user" for name in speakers)


def _is_letter(cell: Any) -> bool:
    return bool(_LETTER.fullmatch(str(to_python(cell)).strip()))


def _is_index(cell: Any) -> bool:
    return _is_letter(cell) or bool(_NUMBER.fullmatch(str(to_python(cell)).strip()))


def _is_target(columns: Columns, name: str) -> bool:
    """Return whether a column can hold a target for a text.

    Counts, numbers of many values, and single words in a column `code`, such as a country's,
    cannot.
    """
    cells = columns.cells(name)
    if not cells or "count" in words_of(name):
        return False
    if columns.mostly(name, is_number_or_bool):
        return len({str(cell) for cell in cells}) <= _MAX_GRADES
    return words_of(name) != {"code"} or columns.mostly(name, lambda cell: " " in str(cell))
