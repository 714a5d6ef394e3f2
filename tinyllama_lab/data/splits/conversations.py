"""Finds what rows have in common: a group, an opening, or an exchange of question and answer.

Chats are often logged as growing prefixes, sliding windows or branches, so that one answer is
in many rows. `splits.py` keeps such rows on one side.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.rows import RawRow, Turn
from tinyllama_lab.data.splits.transcripts import Transcript, is_text, transcript_of

DEEPEST = 3  # answers whose openings are compared
LEAST_SHARED = 10  # conversations that must share an exchange before it can be small talk
_LETTER = re.compile("[\u2e80-\u9fff\uf900-\ufaff]")  # CJK, without spaces: each is a word
_UNSEEN = re.compile("[\u00ad\u200b\u2060\ufeff]")  # soft hyphens and spaces of zero width
LEAST_WORDS = 8  # a line or overlap of this length identifies a text
_GROUP = "group "  # prefix of the mark of a group
_WHOLE = LEAST_WORDS - 2  # complete words of an overlap: a splitter may cut the first and last
_ENOUGH = 64  # words of an overlap that are compared


class Exchange(NamedTuple):
    """An assistant turn and the user turn that it answers, without system turn and history."""

    key: str  # hash of question and answer
    supervised: bool  # whether the answer would be trained on
    before: str  # key of the exchange before it in the row; empty at the beginning
    after: str  # key of the exchange after it; empty at the end


class Candidate(NamedTuple):
    """A row and what it may share with others, as hashes of normalised text."""

    row: RawRow
    prompt: str  # hash of everything before the response
    response: str  # normalised, not hashed
    openings: tuple[str, ...]  # hashes of what precedes the first, second and third answer
    exchanges: tuple[Exchange, ...]
    memberships: tuple[str, ...]  # marks of its group and of the logs that it is a part of

    def sort_key(self) -> tuple[str, str, RawRow]:
        """Return its position in an order that depends on content alone."""
        return self.prompt, self.response, self.row

    def opening(self, depth: int) -> str:
        """Return the hash of what precedes answer number `depth`, or the last answer before it.

        Beyond `DEEPEST`, it is the hash of what precedes the row's response.
        """
        if depth > DEEPEST:
            return self.prompt
        return self.openings[min(depth, len(self.openings)) - 1]

    @property
    def groups(self) -> frozenset[str]:
        """The marks of its group, and of the groups of its duplicates."""
        return frozenset(mark for mark in self.memberships if mark.startswith(_GROUP))

    def marks(self, depth: int, common: Collection[str]) -> Iterator[str]:
        """Yield what no row of the other side may share with it, apart from exchanges.

        A row of small talk alone may stand for duplicates in many groups. It does not connect
        those groups, so their marks are left out.
        """
        yield self.opening(depth)
        is_greeting = bool(self.exchanges) and all(e.key in common for e in self.exchanges)
        left_out = self.groups if len(self.groups) > 1 and is_greeting else ()
        yield from (mark for mark in self.memberships if mark not in left_out)

    def without_groups(self) -> Candidate:
        """Return the same row without its groups."""
        return self._replace(
            memberships=tuple(mark for mark in self.memberships if mark not in self.groups)
        )


@lru_cache(maxsize=8)  # a ready-made text is its own prompt and its own response
def normalise(text: str) -> str:
    """Return the spelling in which equal texts count as the same: NFC, no case, single spaces."""
    if text.isascii():  # the same, five times as fast
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFD", _UNSEEN.sub("", text)).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def candidates(rows: Sequence[RawRow], data: DataConfig) -> list[Candidate]:
    """Return every row with what it may share with others, in the order of `rows`."""
    transcripts = {row: transcript_of(row) for row in rows if not row.messages}
    logs = _logs(transcripts)
    return [_candidate(row, transcripts.get(row), sorted(logs.get(row, ())), data) for row in rows]


def _candidate(
    row: RawRow, transcript: Transcript | None, logs: Sequence[str], data: DataConfig
) -> Candidate:
    """Return a row with the hashes of its openings and exchanges, and its marks."""
    prompt, openings, pairs = _openings(row, data)
    memberships = [f"{_GROUP}{group}"] if (group := normalise(row.group)) else []
    memberships += [f"log {log}" for log in logs]
    exchanges = _chained(pairs)
    if transcript:
        exchanges = _transcript_exchanges(row, transcript, data) or exchanges
    return Candidate(
        row,
        prompt,
        normalise(row.response),
        tuple(openings) or (prompt,),
        exchanges,
        tuple(memberships),
    )


def _openings(row: RawRow, data: DataConfig) -> tuple[str, list[str], list[tuple[str, bool]]]:
    """Return hashes of what precedes the response and the first answers, and the exchanges.

    An exchange is its key, and whether its answer is supervised.
    """
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
                supervised = data.mask == "all" or (
                    turn.supervised and (data.learn == "all" or number == len(turns))
                )
                pairs.append(
                    (_key(question, content, *([turn.extra] * bool(turn.extra))), supervised)
                )
        if number < len(turns):
            parts += [normalise(turn.role), content]
    return _hash(parts), openings, pairs


def _chained(pairs: Sequence[tuple[str, bool]]) -> tuple[Exchange, ...]:
    """Return exchanges that follow each other, from their keys and whether they are supervised."""
    keys = ["", *(key for key, _ in pairs), ""]
    return tuple(
        Exchange(key, supervised, keys[index], keys[index + 2])
        for index, (key, supervised) in enumerate(pairs)
    )


def _transcript_exchanges(row: RawRow, chat: Transcript, data: DataConfig) -> tuple[Exchange, ...]:
    """Return the exchanges of a row that is not a list of messages; empty without a transcript.

    In a ready-made text, everything before the last answer is one more exchange. If no common
    template marks the speakers, so is each long line: both identify another text as well.
    """
    pairs = [(_key(normalise(q), normalise(a)), True) for q, a in chat.exchanges]
    if not is_text(row):
        last = _key(normalise(chat.unanswered), normalise(row.response))
        quoted = [(key, data.mask == "all") for key, _ in pairs]
        return _chained([*quoted, (last, True)]) if pairs else ()
    keys = []
    if pairs:
        keys.append(_key(*(key for key, _ in pairs[:-1]), normalise(chat.exchanges[-1][0])))
    if not chat.marked:
        lines = map(normalise, row.response.split("\n"))
        keys += [_key(line) for line in lines if line.count(" ") >= LEAST_WORDS - 1]
    # the text itself is the neighbour: small talk is counted by distinct neighbours
    whole = _key(row.response)
    return (*_chained(pairs), *(Exchange(key, True, whole, whole) for key in keys))


def _logs(rows: Iterable[RawRow]) -> Mapping[RawRow, set[str]]:
    """Return, for each row that is not a chat, the hashes of texts that it continues or shares.

    A chat may be written into one column as it grows: then one row's text is the beginning of
    another's. A ready-made text may also begin with the end of another one, because splitters
    make overlapping pieces.
    """
    texts = {}
    for row in rows:
        response = "" if is_text(row) else row.response
        text = normalise(f"{row.system} {row.context} {row.prompt or row.response} {response}")
        may_be_cut = is_text(row) and text.count(" ") >= _WHOLE
        texts[row] = text if may_be_cut else f"{text} "
    logs = defaultdict[RawRow, set[str]](set)
    root: tuple[RawRow, str] | None = None
    for row, text in sorted(texts.items(), key=lambda item: item[1]):
        if root is not None and text.startswith(root[1]):
            for member in (root[0], row):
                logs[member].add(_hash([root[1]]))
        else:
            root = row, text
    for row, shared in _overlaps({row: text for row, text in texts.items() if is_text(row)}):
        logs[row].add(shared)
    return logs


def _overlaps(texts: Mapping[RawRow, str]) -> Iterator[tuple[RawRow, str]]:
    """Yield pairs of a row and the hash of an overlap: the start of a text, found in another one.

    The overlap is the whole text, or reaches the end of the other one, or has `_ENOUGH` words.
    Beginnings that very many texts share do not count.
    """
    spaced = {row: " ".join(_LETTER.sub(r" \g<0> ", text).split()) for row, text in texts.items()}
    starts = {
        row: " ".join(text.split(" ", _ENOUGH)[:_ENOUGH])
        for row, text in spaced.items()
        if text.count(" ") >= _WHOLE
    }
    rows = sorted(starts, key=starts.__getitem__)
    ordered = [starts[row] for row in rows]
    roots = list(accumulate(ordered, _root))
    heads = _heads(ordered, len(texts))
    for row, text in spaced.items():
        for end in _ends(text.split(" "), heads) - {starts.get(row)}:
            first = bisect_left(ordered, end)
            behind = bisect_left(ordered, f"{end}\U0010ffff")
            first -= first > 0 and end.startswith(roots[first - 1])
            if first < behind and not _is_common(behind - first, len(texts)):
                yield from ((member, _key(end)) for member in (row, *rows[first:behind]))


def _root(root: str, text: str) -> str:
    """Return `root` if a text begins with it, else the text: for sorted texts."""
    return root if text.startswith(root) else text


Heads = Mapping[str, Mapping[str, set[str]]]  # second word -> words from it on -> first words


def _heads(starts: Sequence[str], conversations: int) -> Heads:
    """Return the first words of texts, without those that very many texts share.

    The first word is kept apart, because a splitter may have cut it. The second word is the
    outer key, so that a word of a text finds its heads fast.
    """
    first_words = defaultdict[str, list[str]](list)
    for start in starts:
        first, *words = start.split(" ", _WHOLE + 1)[: _WHOLE + 1]
        first_words[" ".join(words)].append(first)
    heads = defaultdict[str, dict[str, set[str]]](dict)
    for head, firsts in first_words.items():
        if not _is_common(len(firsts), conversations):
            heads[head.split(" ", 1)[0]][head] = {*firsts}
    return heads


def _ends(words: Sequence[str], heads: Heads) -> set[str]:
    """Return what follows in a text, up to `_ENOUGH` words, wherever another text may begin."""
    return {
        " ".join((start, *words[index : index + _ENOUGH - 1]))
        for index, word in enumerate(words[1:], 1)
        if word in heads
        for start in heads[word].get(" ".join(words[index : index + _WHOLE]), ())
        if words[index - 1].endswith(start)
    }


def _is_common(count: int, conversations: int) -> bool:
    """Return whether so many conversations share something that it identifies none of them."""
    return count >= LEAST_SHARED and count * 100 > conversations


def _hash(parts: Sequence[str]) -> str:
    """Return the hash that decides a row's position in the split.

    It must never change: another hash would hold out other rows than in earlier studies.
    """
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _key(*parts: str) -> str:
    """Return a hash for comparisons within one run; faster than `_hash`."""
    return hashlib.blake2b(
        "\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16
    ).hexdigest()


def small_talk(rows: Sequence[Candidate], depth: int) -> set[str]:
    """Return the keys of exchanges that leak nothing, because very many conversations share them.

    Those are more than 1 % of the conversations, and at least 10. Rows with the same opening
    are one conversation. So are rows in which an exchange has the same neighbours: a window that
    slides over one chat repeats the exchange, but always between the same two. Exchanges that only
    occur together count as one, with the neighbours of both ends. A group is a conversation too,
    and needs no neighbours to be distinct.
    """
    openings, before, after, groups_of = (defaultdict[str, set[str]](set) for _ in range(4))
    counts = Counter(exchange.key for row in rows for exchange in row.exchanges)
    for row in rows:
        for exchange in row.exchanges if row.groups else ():
            groups_of[exchange.key] |= row.groups
    frequent = {key for key, count in counts.items() if count >= LEAST_SHARED}
    conversations = {row.opening(depth) for row in rows}
    for row in rows:
        opening = row.opening(depth)
        for exchange in (e for e in row.exchanges if e.key in frequent):
            openings[exchange.key].add(opening)
            before[exchange.key].add(exchange.before)
            after[exchange.key].add(exchange.after)
    by_group = {
        key for key, names in groups_of.items() if _is_common(len(names), len(conversations))
    }
    return by_group | {
        key
        for key, starts in openings.items()
        if _is_common(len(starts), len(conversations))
        and _is_common(
            max(_beyond(key, before, after), _beyond(key, after, before)), len(conversations)
        )
    }


def _beyond(key: str, back: Mapping[str, set[str]], onward: Mapping[str, set[str]]) -> int:
    """Return the number of distinct neighbours at the end of a chain that starts with `key`.

    The chain is the exchanges that always follow each other, and so count as one.
    """
    seen = {key}
    while len(neighbours := onward[key] - {""}) == 1:
        (following,) = neighbours
        if following in seen or back.get(following, set()) - {""} != {key}:
            break
        seen.add(key := following)
    return len(onward[key])


def groups(
    rows: Sequence[Candidate], depth: int, exchanges: bool, common: set[str]
) -> list[list[Candidate]]:
    """Return rows that must stay together, in the order in which a split takes them.

    Rows are united if they share a mark or, with `exchanges`, an exchange that is not `common`.
    Groups are ordered by the hash of their prompts, rows in a group by prompt and response.
    """
    parent: dict[str, str] = {}  # a disjoint-set forest

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]  # path halving
        return key

    for row in rows:
        first = root(row.opening(depth))
        shared = (e.key for e in row.exchanges if exchanges and e.key not in common)
        for key in (*row.marks(depth, common), *shared):
            parent[root(key)] = first
    members = defaultdict[str, list[Candidate]](list)
    for row in rows:
        members[root(row.opening(depth))].append(row)
    return sorted(
        (sorted(group, key=Candidate.sort_key) for group in members.values()),
        key=lambda group: (_group_sort_key(group), group[0].sort_key()),
    )


def _group_sort_key(group: Sequence[Candidate]) -> str:
    """Return the hash of a group's distinct prompts; of a single one, the hash that it has."""
    prompts = sorted({row.prompt for row in group})
    return prompts[0] if len(prompts) == 1 else _hash(prompts)
