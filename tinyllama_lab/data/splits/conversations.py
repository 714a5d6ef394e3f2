"""What rows have in common: a group, a beginning, or an exchange of question and answer.

Chats are often logged as growing prefixes, as sliding windows, or branch by branch, so that one
answer stands in many rows. `splits.py` keeps such rows on one side.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.rows import RawRow, Turn
from tinyllama_lab.data.splits.transcripts import Transcript, is_text, transcript_of

DEEPEST = 3  # answers whose openings are told apart
LEAST_SHARED = 10  # conversations that share an exchange before it can count as small talk
_LETTER = re.compile(
    "[\u2e80-\u9fff\uf900-\ufaff]"
)  # of scripts without spaces: it counts as a word
_UNSEEN = re.compile("[\u00ad\u200b\u2060\ufeff]")  # in a text, these change no word of it
LEAST_WORDS = 8  # of a line, or of what two texts overlap by, before it gives a text away
_GROUP = "group "  # before its name, as a mark
_WHOLE = LEAST_WORDS - 2  # of the words of an overlap: a splitter may cut the first and the last
_ENOUGH = 64  # words of an overlap after which no more are compared


class Exchange(NamedTuple):
    """An assistant turn and the user turn that it answers, without system turn and history."""

    key: str
    supervised: bool  # whether the answer would be trained on
    before: str  # the keys of its neighbours in the row; empty at the ends
    after: str


class Candidate(NamedTuple):
    """A row and what it may share with others, as hashes of normalised text."""

    row: RawRow
    prompt: str  # of everything before the response
    response: str  # normalised
    openings: tuple[str, ...]  # of what precedes the first answer, the second, the third
    exchanges: tuple[Exchange, ...]
    memberships: tuple[str, ...]  # its group, and the log it is a part of

    def sort_key(self) -> tuple[str, str, RawRow]:
        """Where it stands in an order that depends on content alone."""
        return self.prompt, self.response, self.row

    def opening(self, depth: int) -> str:
        """The hash of what precedes the answer number `depth`, or its last one.

        Beyond the deepest it is that of what precedes the row's last answer.
        """
        if depth > DEEPEST:
            return self.prompt
        return self.openings[min(depth, len(self.openings)) - 1]

    @property
    def groups(self) -> frozenset[str]:
        """Its group, and those of the rows that it stands for."""
        return frozenset(mark for mark in self.memberships if mark.startswith(_GROUP))

    def marks(self, depth: int, common: Collection[str]) -> Iterator[str]:
        """What no row of the other side may share, apart from exchanges.

        One row of small talk may stand for many groups: it does not tie these to each other.
        """
        yield self.opening(depth)
        is_greeting = bool(self.exchanges) and all(e.key in common for e in self.exchanges)
        tied = len(self.groups) > 1 and is_greeting
        yield from (mark for mark in self.memberships if not tied or mark not in self.groups)

    def without_groups(self) -> Candidate:
        """The same row, in no group."""
        return self._replace(
            memberships=tuple(mark for mark in self.memberships if mark not in self.groups)
        )


@lru_cache(maxsize=8)  # a ready-made text is its own prompt and its own response
def normalise(text: str) -> str:
    """The spelling in which two texts count as the same: NFC, no case, single spaces."""
    if text.isascii():  # the same, five times as fast
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFD", _UNSEEN.sub("", text)).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def candidates(rows: Sequence[RawRow], data: DataConfig) -> list[Candidate]:
    """Every row with what it may share with others, in the order of `rows`."""
    written = {row: transcript_of(row) for row in rows if not row.messages}
    logs = _logs(written)
    return [_candidate(row, written.get(row), sorted(logs.get(row, ())), data) for row in rows]


def _candidate(
    row: RawRow, written: Transcript | None, logs: Sequence[str], data: DataConfig
) -> Candidate:
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
    prompt = _hash(parts)
    memberships = [f"{_GROUP}{group}"] if (group := normalise(row.group)) else []
    memberships += [f"log {log}" for log in logs]
    exchanges = _chained(pairs)
    if written:
        exchanges = _written(row, written, data) or exchanges
    return Candidate(
        row,
        prompt,
        normalise(row.response),
        tuple(openings) or (prompt,),
        exchanges,
        tuple(memberships),
    )


def _chained(pairs: Sequence[tuple[str, bool]]) -> tuple[Exchange, ...]:
    """Exchanges that follow each other, from their keys and whether they are learned."""
    keys = ["", *(key for key, _ in pairs), ""]
    return tuple(
        Exchange(key, supervised, keys[place], keys[place + 2])
        for place, (key, supervised) in enumerate(pairs)
    )


def _written(row: RawRow, chat: Transcript, data: DataConfig) -> tuple[Exchange, ...]:
    """The exchanges of a row that is no list of messages; none where nothing is written out.

    Where a chat is written out in it, they are those of that chat. Of a ready-made text, what
    precedes its last answer counts as one as well, and so does a long line where no usual mark
    says who speaks: they give as much of another text away.
    """
    pairs = [(_key(normalise(q), normalise(a)), True) for q, a in chat.exchanges]
    if not is_text(row):
        asked = _key(normalise(chat.rest), normalise(row.response))
        quoted = [(key, data.mask == "all") for key, _ in pairs]
        return _chained([*quoted, (asked, True)]) if pairs else ()
    shared = []
    if pairs:
        shared.append(_key(*(key for key, _ in pairs[:-1]), normalise(chat.exchanges[-1][0])))
    if not chat.marked:
        lines = map(normalise, row.response.split("\n"))
        shared += [_key(line) for line in lines if line.count(" ") >= LEAST_WORDS - 1]
    whole = _key(row.response)  # as neighbour, so that every text counts
    return (*_chained(pairs), *(Exchange(key, True, whole, whole) for key in shared))


def _logs(written: Mapping[RawRow, Transcript]) -> Mapping[RawRow, set[str]]:
    """By row that is no chat, the hashes of texts that it continues or shares with others.

    A chat may be written out in one column: one row's whole text is then the beginning of
    another's. Of ready-made texts, one may also begin with the end of another: a splitter that
    lets its pieces overlap makes such texts.
    """
    texts = {}
    for row in written:
        response = "" if is_text(row) else row.response
        text = normalise(f"{row.system} {row.context} {row.prompt or row.response} {response}")
        may_be_cut = is_text(row) and text.count(" ") >= _WHOLE
        texts[row] = text if may_be_cut else f"{text} "
    logs = defaultdict[RawRow, set[str]](set)
    root: tuple[RawRow, str] | None = None
    for row, text in sorted(texts.items(), key=lambda item: item[1]):
        if root is not None and text.startswith(root[1]):
            for each in (root[0], row):
                logs[each].add(_hash([root[1]]))
        else:
            root = row, text
    for row, shared in _overlaps({row: text for row, text in texts.items() if is_text(row)}):
        logs[row].add(shared)
    return logs


def _overlaps(texts: Mapping[RawRow, str]) -> Iterator[tuple[RawRow, str]]:
    """Rows, and the hash of what one has somewhere in it and the other at its beginning.

    That is all of the other, or goes on to the end of the one, or has `_ENOUGH` words. What very
    many begin with is no part of a longer text.
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
                yield from ((each, _key(end)) for each in (row, *rows[first:behind]))


def _root(root: str, text: str) -> str:
    """The first of the texts, in their order, that a text begins with; else itself."""
    return root if text.startswith(root) else text


Heads = Mapping[str, Mapping[str, set[str]]]


def _heads(starts: Sequence[str], conversations: int) -> Heads:
    """The first words of texts: by the second word and those after it, the first ones.

    By the second word alone they are found fast.
    """
    found = defaultdict[str, list[str]](list)
    for start in starts:
        first, *words = start.split(" ", _WHOLE + 1)[: _WHOLE + 1]
        found[" ".join(words)].append(first)
    heads = defaultdict[str, dict[str, set[str]]](dict)
    for head, cut in found.items():
        if not _is_common(len(cut), conversations):
            heads[head.split(" ", 1)[0]][head] = {*cut}
    return heads


def _ends(words: Sequence[str], heads: Heads) -> set[str]:
    """What follows in a text from each place on at which another may begin."""
    return {
        " ".join((start, *words[place : place + _ENOUGH - 1]))
        for place, word in enumerate(words[1:], 1)
        if word in heads
        for start in heads[word].get(" ".join(words[place : place + _WHOLE]), ())
        if words[place - 1].endswith(start)
    }


def _is_common(count: int, conversations: int) -> bool:
    """Whether so many conversations share something that it gives nothing away."""
    return count >= LEAST_SHARED and count * 100 > conversations


def _hash(parts: Sequence[str]) -> str:
    """Of what decides where a row stands, and whether it is held out: it must stay as it is."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _key(*parts: str) -> str:
    return hashlib.blake2b(
        "\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16
    ).hexdigest()


def small_talk(found: Sequence[Candidate], depth: int) -> set[str]:
    """Exchanges that give nothing away, because very many conversations share them.

    These are more than 1 % of the conversations, and at least 10. Rows that begin alike are one
    conversation. So are rows in which an exchange has the same neighbours: a window that slides
    over one chat shows it again and again, but always between the same two. Exchanges that are
    never one without the other count as one, and have the neighbours of all of them. A group is a
    conversation too, and needs no neighbours to be told from others.
    """
    openings, before, after, named = (defaultdict[str, set[str]](set) for _ in range(4))
    counts = Counter(exchange.key for each in found for exchange in each.exchanges)
    for each in found:
        for exchange in each.exchanges if each.groups else ():
            named[exchange.key] |= each.groups
    often = {key for key, count in counts.items() if count >= LEAST_SHARED}
    conversations = {each.opening(depth) for each in found}
    for each in found:
        opening = each.opening(depth)
        for exchange in (e for e in each.exchanges if e.key in often):
            openings[exchange.key].add(opening)
            before[exchange.key].add(exchange.before)
            after[exchange.key].add(exchange.after)
    shared = {
        key for key, found_in in named.items() if _is_common(len(found_in), len(conversations))
    }
    return shared | {
        key
        for key, starts in openings.items()
        if _is_common(len(starts), len(conversations))
        and _is_common(
            max(_beyond(key, before, after), _beyond(key, after, before)), len(conversations)
        )
    }


def _beyond(key: str, back: Mapping[str, set[str]], onward: Mapping[str, set[str]]) -> int:
    """How many different neighbours the exchanges have that always come together with one."""
    seen = {key}
    while len(found := onward[key] - {""}) == 1:
        (following,) = found
        if following in seen or back.get(following, set()) - {""} != {key}:
            break
        seen.add(key := following)
    return len(onward[key])


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
        for key in (*each.marks(depth, common), *shared):
            leader[lead(key)] = first
    members = defaultdict[str, list[Candidate]](list)
    for each in found:
        members[lead(each.opening(depth))].append(each)
    return sorted(
        (sorted(group, key=Candidate.sort_key) for group in members.values()),
        key=lambda group: (_group_sort_key(group), group[0].sort_key()),
    )


def _group_sort_key(group: Sequence[Candidate]) -> str:
    prompts = sorted({each.prompt for each in group})
    return prompts[0] if len(prompts) == 1 else _hash(prompts)
