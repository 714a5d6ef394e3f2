"""Turns rows into token sequences with loss masks, for training and scoring."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.core.dataset.example import Example, clusters, with_text
from tinyllama_lab.core.dataset.lengths import check_lengths, too_few
from tinyllama_lab.core.dataset.prompts import PromptFormat
from tinyllama_lab.core.dataset.records import read_split
from tinyllama_lab.data.formats.cells import UnusableRow
from tinyllama_lab.data.rows import LeftOut, RawRow
from tinyllama_lab.data.splits.enough import check_enough
from tinyllama_lab.data.splits.leakage import leak_free_rows
from tinyllama_lab.data.splits.overlap import count_overlap
from tinyllama_lab.data.splits.splits import Split
from tinyllama_lab.data.splits.subsets import in_training_order
from tinyllama_lab.errors import DataError
from tinyllama_lab.study.evaluations import HELDOUT
from tinyllama_lab.study.trial import digest

STYLE = "style"  # the fact that names the `data.style` of the rows, recognised or typed
_BINS = 12  # of the histogram of lengths, at most
_TRIED = 4  # times `data.eval_n` rows, among which those for confirmation are looked for


@dataclass
class Prepared:
    """The data of one trial, ready to train on and to score."""

    train: list[Example]
    heldout: list[Example]  # those that are scored
    facts: dict[str, Any]  # for the result: fingerprints, rows, tokens, dropped rows by reason
    notes: list[str] = field(default_factory=list)  # anything that users may not expect


class Examined:
    """A data set under one tokenizer: which rows are used, and why others are not."""

    def __init__(
        self,
        split: Split,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        encoded: dict[int, Example | UnusableRow],
        positions: int | None = None,
    ) -> None:
        """`encoded` caches the tokens of rows, shared by subsets of the same data set."""
        self.split = split
        self.data = data
        self.unusable = LeftOut()  # rows that are not used once they are tokens
        _check_template(tokenizer, split, data)
        self._encode = Encoder(tokenizer, data, positions)
        self._encoded = encoded
        # the rows that are used, and how many behind them were not tried
        self.heldout, self.reserve = self._take(split.heldout, data.eval_n)
        self.train, self.beyond = self._take(split.train, data.train_rows)

    @cached_property
    def confirmation(self) -> list[RawRow]:
        """Return at most `data.eval_n` usable rows for confirmation, in the order of the split.

        They are rows marked as test, else rows in reserve, without clusters of scored rows.
        """
        scored, most = self.heldout, self.data.eval_n
        usable = islice(filter(self.is_usable, self._unseen), _TRIED * most)
        rows = leak_free_rows(scored, list(usable), self.data)
        first_members = clusters(self.examples([*scored, *rows]))[len(scored) :]
        pairs = zip(rows, first_members, strict=True)
        return [row for row, first in pairs if first >= len(scored)][:most]

    @property
    def _unseen(self) -> list[RawRow]:
        """Return the rows from which those for confirmation are taken."""
        heldout = self.split.heldout
        return self.split.test or heldout[len(heldout) - self.reserve :]

    def why_unconfirmed(self) -> str:
        """Return why there are no confirmation rows."""
        count, is_marked = len(self._unseen), self.split.resplit is None
        if not count and is_marked:
            return "all rows that are marked as held out are scored, and none is marked as test"
        if not count:
            return "no row is left in reserve"
        rows = f"{count} row{'s' * (count > 1)} "
        rows += (
            "marked as test" if self.split.test else "not scored" if is_marked else "in reserve"
        )
        if not any(map(self.is_usable, self._unseen)):
            return f"none of the {rows} is usable once it is tokens"
        return (
            f"each of the {rows} belongs together with a held-out row (its group, its question or "
            "much the same answer)"
        )

    def is_usable(self, row: RawRow) -> bool:
        """Return whether a row of the split can become a token sequence."""
        return isinstance(self._of(row), Example)

    def examples(self, rows: Iterable[RawRow]) -> list[Example]:
        """Return the token sequences of usable rows."""
        return [example for row in rows if isinstance(example := self._of(row), Example)]

    @property
    def left_out(self) -> LeftOut:
        """Return all rows left out before or after tokenization."""
        return self.split.dropped | self.unusable

    def why_unusable(self) -> str:
        """Return why tokenized rows are unusable; an empty string if none is."""
        unusable = LeftOut()
        for row in (*self.split.heldout, *self.split.test, *self.split.train):
            if isinstance(error := self._encoded.get(id(row)), UnusableRow):
                unusable.add(error.reason, row.number, str(error))
        return f"unusable once they are tokens: {unusable.explained}" if unusable.counts else ""

    def _of(self, row: RawRow) -> Example | UnusableRow:
        if id(row) not in self._encoded:
            try:
                self._encoded[id(row)] = self._encode(row)
            except UnusableRow as error:
                self._encoded[id(row)] = error
        return self._encoded[id(row)]

    def _take(self, rows: Sequence[RawRow], count: int | None) -> tuple[list[RawRow], int]:
        """Return the first `count` usable rows (None: all), and how many rows were not tried.

        Unusable rows before them are added to `unusable`.
        """
        usable_rows: list[RawRow] = []
        for tried, row in enumerate(rows):
            # tokenizing is slow: rows beyond the requested number are not tried
            if len(usable_rows) == count:
                return usable_rows, len(rows) - tried
            encoded = self._of(row)
            if isinstance(encoded, Example):
                usable_rows.append(row)
            else:
                self.unusable.add(encoded.reason, row.number, str(encoded))
        return usable_rows, 0


class DataCache:
    """Reads and splits every data set of a pack once, however many trials use parts of it.

    Args:
        positions: the longest sequence that the model knows, in tokens; None for no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.positions = positions
        self._prepared: dict[str, Prepared] = {}
        self._splits: dict[str, Split] = {}
        self._encoded: dict[str, dict[int, Example | UnusableRow]] = {}

    def prepare(self, data: DataConfig, seed: int = 0, scored: str = HELDOUT) -> Prepared:
        """Return examples for training and for scoring.

        Args:
            data: the data settings.
            seed: used only with `data.subset=seed`.
            scored: which rows are scored, a value of `eval.rows`.

        Raises:
            DataError: fewer usable rows than `data.n` or `data.eval_n`, no confirmation rows
                where they are to be scored, or a sequence that is longer than the model's
                positions.
        """
        subset_seed = seed if data.subset == "seed" else None
        key = digest([asdict(data), subset_seed, scored])
        if key not in self._prepared:
            self._prepared[key] = self._read(data, seed, scored)
        return self._prepared[key]

    def examine(self, data: DataConfig, seed: int = 0) -> Examined:
        """Return the rows that `prepare` takes, without checking that there are enough."""
        # subsets are cut from one split
        key = digest({**asdict(data), "n": None, "subset": None})
        if key not in self._splits:
            self._splits[key] = read_split(data)
        split = self._splits[key]
        split = replace(split, train=in_training_order(split.train, data, seed))
        if split.data is not None:  # columns that were recognised
            data = replace(data, columns=split.data.columns, style=split.data.style)
        encoded = self._encoded.setdefault(key, {})
        return Examined(split, data, self.tokenizer, encoded, self.positions)

    def _read(self, data: DataConfig, seed: int, scored: str) -> Prepared:
        examined = self.examine(data, seed)
        try:
            check_enough(examined.split, data, f"data={data.name}", examined.is_usable)
        except DataError as error:
            reasons = examined.why_unusable()
            # without any usable row, other numbers of rows would not help
            if reasons and not examined.train and not examined.heldout:
                raise DataError(f"data={data.name} has no usable row: all are {reasons}") from None
            raise DataError(*([reasons] if reasons else []), *error.problems) from None
        rows = examined.heldout if scored == HELDOUT else examined.confirmation
        if not rows:
            raise DataError(
                f"eval.rows={scored} needs rows that are neither trained on nor held out, and "
                f"data={data.name} has none; mark some as test in data.columns.split, lower "
                f"data.eval_n, or set eval.rows={HELDOUT}"
            )
        train = examined.examples(examined.train)
        heldout = with_text(examined.examples(rows), self.tokenizer)
        check_lengths([*train, *heldout], self.positions)
        facts = _facts(train, heldout, examined)
        all_rows = [*examined.split.train, *examined.split.heldout, *examined.split.test]
        overlap = count_overlap(examined.train, rows, all_rows, data)
        facts["overlap_rows"] = overlap
        notes = _notes(facts, examined, data)
        if data.kind.is_remote:  # the driver has printed those of other sources
            notes = [*examined.split.notes, *notes]
        return Prepared(train, heldout, facts, notes)


class Encoder:
    """Encodes rows as examples, cut at `data.max_length` tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        positions: int | None = None,
    ) -> None:
        """`positions` is the longest sequence of the model, as in `DataCache`."""
        self._data = data
        self._positions = positions
        self._format = PromptFormat(tokenizer, data)

    def __call__(self, row: RawRow) -> Example:
        """Return the token sequence of one row.

        Raises:
            UnusableRow: the row cannot be encoded, or no supervised token is left.
        """
        data, sequence = self._data, self._format(row)
        learns_all = data.mask == "all"
        loss_mask = [True] * len(sequence.ids) if learns_all else sequence.supervised
        if sequence.prompt >= data.max_length or not any(loss_mask[1 : data.max_length]):
            raise UnusableRow(
                "too_long",
                f"nothing of its answer is left: its prompt takes {sequence.prompt} tokens; "
                f"{self._way_to_fit(sequence.prompt)}",
            )
        return Example(
            ids=tuple(sequence.ids[: data.max_length]),
            loss_mask=tuple(loss_mask[: data.max_length]),
            prompt_ids=tuple(sequence.ids[: sequence.prompt]),
            prompt=sequence.question,
            reference=sequence.response,
            intent=row.intent,
            is_cut=any(sequence.supervised[data.max_length :]),
            is_folded=sequence.is_folded,
            is_trimmed=sequence.is_trimmed,
            number=row.number,
            group=row.group,
        )

    def _way_to_fit(self, prompt: int) -> str:
        """Return the advice for a prompt of `prompt` tokens that leaves no room."""
        if self._positions is not None and prompt >= self._positions:
            return too_few(self._positions)
        return f"raise data.max_length={self._data.max_length}"


def _check_template(tokenizer: PreTrainedTokenizerBase, split: Split, data: DataConfig) -> None:
    """Refuse chats without a chat template; no other style supports them.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    is_chat = any(row.messages or row.system or row.tools for row in split.remaining)
    if data.style == "chat" and is_chat and not tokenizer.chat_template:
        raise DataError(
            "chats, system turns and tools need a tokenizer with a chat template, got none in "
            "this model; take a model that was made for chats, or save a template with the "
            "tokenizer of this one"
        )


def fingerprint(examples: Iterable[Example]) -> str:
    """Return a hash of token ids and loss masks, in order, as 16 hex digits."""
    hasher = hashlib.sha256()
    for example in examples:
        hasher.update(repr((example.ids, example.loss_mask)).encode())
    return hasher.hexdigest()[:16]


def _facts(train: list[Example], heldout: list[Example], examined: Examined) -> dict[str, Any]:
    return {
        "cut_rows": sum(e.is_cut for e in train),
        "eval_cut_rows": sum(e.is_cut for e in heldout),
        "folded_rows": sum(e.is_folded for e in (*train, *heldout)),
        "trimmed_rows": sum(e.is_trimmed for e in (*train, *heldout)),
        "rows": examined.split.rows,
        STYLE: examined.data.style,
        "unusable_rows": examined.unusable.counts.total(),
        "train_fingerprint": fingerprint(train),
        "eval_fingerprint": fingerprint(heldout),
        "eval_text_fingerprint": digest([e.text for e in heldout]),
        "train_rows": len(train),
        "eval_rows": len(heldout),
        "eval_groups": len({e.group or str(n) for n, e in enumerate(heldout)}),
        "confirmation_rows": len(examined.confirmation),
        "train_tokens": sum(len(e.ids) for e in train),
        "train_label_tokens": sum(e.labels for e in train),
        "eval_tokens": sum(len(e.ids) for e in heldout),
        "eval_label_tokens": sum(e.labels for e in heldout),
        "eval_bytes": sum(e.text_bytes for e in heldout),
        "train_lengths": length_histogram([len(e.ids) for e in train]),
        "dropped": examined.left_out.facts,
    }


def _notes(facts: dict[str, Any], examined: Examined, data: DataConfig) -> list[str]:
    """Return a line for every way in which rows are left out, cut or changed."""
    left_out = examined.left_out.sentence(examined.split.rows)
    notes = [left_out] if left_out else []
    cut = facts["cut_rows"] + facts["eval_cut_rows"]
    rows = facts["train_rows"] + facts["eval_rows"]
    if cut:
        notes.append(
            f"{cut} of {rows} answers are cut at {data.max_length} tokens and do not end; "
            "raise data.max_length"
        )
    return [*notes, *changes(facts["folded_rows"], facts["trimmed_rows"], rows)]


def changes(folded: int, trimmed: int, rows: int) -> Iterator[str]:
    """Yield a line for every change, with the number of rows that it affects."""
    if folded:
        yield (
            "the chat template takes no system turn: it became a part of the first user turn in "
            f"{folded} of {rows} rows"
        )
    if trimmed:
        yield (
            f"in {trimmed} of {rows} rows an answer begins with white space, which the tokenizer "
            "would join to the prompt: these rows are used, without that white space"
        )


def length_histogram(lengths: Sequence[int]) -> dict[str, list[int]]:
    """Return bin edges and counts; a bin includes its lower edge."""
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // _BINS)
    edges = list(range(low, high + width + 1, width))
    counts = Counter((length - low) // width for length in lengths)
    return {"edges": edges, "counts": [counts[number] for number in range(len(edges) - 1)]}
