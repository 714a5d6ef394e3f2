"""What rows have in common: a group, a beginning, or an exchange of question and answer.

Chats are often logged as growing prefixes, as sliding windows, or branch by branch, so that one
answer stands in many rows. `splits.py` keeps such rows on one side.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tinyllama_lab.config import DataConfig
from tinyllama_lab.rows import Row, Turn

DEEPEST = 3  # answers whose openings are told apart
LEAST_SHARED = 10  # conversations that share an exchange before it can count as small talk


class Exchange(NamedTuple):
    """An assistant turn and the user turn that it answers, without system turn and history."""

    key: str
    learned: bool  # whether the answer would be trained on
    before: str  # the keys of its neighbours in the row; empty at the ends
    after: str


class Candidate(NamedTuple):
    """A row and what it may share with others, as hashes of normalised text."""

    row: Row
    prompt: str  # of everything before the response
    response: str  # normalised
    openings: tuple[str, ...]  # of what precedes the first answer, the second, the third
    exchanges: tuple[Exchange, ...]
    own: tuple[str, ...]  # its group, and the log it is a part of

    def place(self) -> tuple[str, str, Row]:
        """Where it stands in an order that depends on content alone."""
        return self.prompt, self.response, self.row

    def opening(self, depth: int) -> str:
        """The hash of what precedes the answer number `depth`, or its last one."""
        return self.openings[min(depth, len(self.openings)) - 1]

    def marks(self, depth: int) -> Iterator[str]:
        """What no row of the other side may share, apart from exchanges."""
        yield self.opening(depth)
        yield from self.own


def normalise(text: str) -> str:
    """The spelling in which two texts count as the same: NFC, no case, single spaces."""
    folded = unicodedata.normalize("NFD", text).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def candidates(rows: Sequence[Row], data: DataConfig) -> list[Candidate]:
    """Every row with what it may share with others, in the order of `rows`."""
    logs = _logs(rows)
    return [_candidate(row, logs.get(row, ""), data) for row in rows]


def _candidate(row: Row, log: str, data: DataConfig) -> Candidate:
    turns = row.messages or (Turn("user", row.prompt), Turn("assistant", row.response))
    parts = [normalise(row.context)]
    if row.system:
        parts += ["system", normalise(row.system)]
    if not row.messages and not (row.prompt.strip() or row.context.strip()):
        parts.append(normalise(row.response))  # one ready-made text: it has no prompt to share
    openings: list[str] = []
    pairs: list[tuple[str, bool]] = []
    question = "" if row.messages else parts[0]
    asked = False
    for number, turn in enumerate(turns, 1):
        content = normalise(turn.content)
        if turn.role == "user":
            asked = True
            question = content if row.messages else f"{content} {question}".strip()
        elif turn.role == "assistant" and asked:
            if len(openings) < DEEPEST:
                openings.append(_hash(parts))
            if question and (content or turn.extra):
                learned = data.mask == "all" or (
                    turn.supervised and (data.learn == "all" or number == len(turns))
                )
                pairs.append((_hash([question, content, turn.extra]), learned))
        if number < len(turns):
            parts += [normalise(turn.role), content]
    prompt = _hash(parts)
    keys = ["", *(key for key, _ in pairs), ""]
    exchanges = tuple(
        Exchange(key, learned, keys[place], keys[place + 2])
        for place, (key, learned) in enumerate(pairs)
    )
    group = [f"group {row.group.strip()}"] if row.group.strip() else []
    own = tuple(group + [f"log {log}"] * bool(log))
    return Candidate(
        row, prompt, normalise(row.response), tuple(openings) or (prompt,), exchanges, own
    )


def _logs(rows: Iterable[Row]) -> dict[Row, str]:
    """By row that is no chat, the hash of the text that it continues or begins with others.

    A chat may be written out in one column: one row's whole text is then the beginning of
    another's. Rows that continue no other and are continued by none are not in the result.
    """
    texts = {}
    for row in rows:
        if not row.messages:
            # one ready-made text is its own prompt and its own response
            response = "" if row.response == row.prompt else row.response
            whole = f"{row.system} {row.context} {row.prompt} {response}"
            texts[row] = normalise(whole) + " "
    logs: dict[Row, str] = {}
    root: tuple[Row, str] | None = None
    for row, text in sorted(texts.items(), key=lambda item: item[1]):
        if root is not None and text.startswith(root[1]):
            logs[root[0]] = logs[row] = _hash([root[1]])
        else:
            root = row, text
    return logs


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def small_talk(found: Iterable[Candidate], depth: int) -> set[str]:
    """Exchanges that give nothing away, because very many conversations share them.

    These are more than 1 % of the conversations, and at least 10. Rows that begin alike are one
    conversation. So are rows in which an exchange has the same neighbours: a window that slides
    over one chat shows it again and again, but always between the same two.
    """
    openings, before, after = (defaultdict[str, set[str]](set) for _ in range(3))
    conversations = set()
    for each in found:
        opening = each.opening(depth)
        conversations.add(opening)
        for exchange in each.exchanges:
            openings[exchange.key].add(opening)
            before[exchange.key].add(exchange.before)
            after[exchange.key].add(exchange.after)
    return {
        key
        for key, starts in openings.items()
        if LEAST_SHARED <= (shared := min(len(starts), max(len(before[key]), len(after[key]))))
        and shared * 100 > len(conversations)
    }


def groups(
    found: Sequence[Candidate], depth: int, exchanges: bool, common: set[str]
) -> list[list[Candidate]]:
    """Candidates that must stay together, in the order in which a split takes them.

    Those are united that share a mark or, with `exchanges`, an exchange that is not `common`.
    A group is placed by the hash of its prompts, a row in it by its prompt and response.
    """
    leader: dict[str, str] = {}

    def lead(key: str) -> str:
        while leader.setdefault(key, key) != key:
            leader[key] = key = leader[leader[key]]  # halves the way for the next one
        return key

    for each in found:
        first = lead(each.opening(depth))
        shared = (e.key for e in each.exchanges if exchanges and e.key not in common)
        for key in (*each.marks(depth), *shared):
            leader[lead(key)] = first
    members = defaultdict[str, list[Candidate]](list)
    for each in found:
        members[lead(each.opening(depth))].append(each)
    return sorted(
        (sorted(group, key=Candidate.place) for group in members.values()),
        key=lambda group: (_group_place(group), group[0].place()),
    )


def _group_place(group: Sequence[Candidate]) -> str:
    prompts = sorted({each.prompt for each in group})
    return prompts[0] if len(prompts) == 1 else _hash(prompts)
