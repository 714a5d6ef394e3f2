"""From rows to masked token sequences: what is trained on, what is scored, and their prints."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tinyllama_lab import hub
from tinyllama_lab.config import DataConfig
from tinyllama_lab.core.prompts import render
from tinyllama_lab.enough import check_enough
from tinyllama_lab.errors import DataChangedError, DataError
from tinyllama_lab.overlap import count_overlap
from tinyllama_lab.rows import LeftOut, Row
from tinyllama_lab.sources import content_digest, load_held_out, load_rows
from tinyllama_lab.splits import Split, split_records
from tinyllama_lab.trial import digest

_BINS = 12  # of the histogram of lengths, at most


@dataclass(frozen=True)
class Example:
    """One token sequence. `learned[i]` says whether token `i` counts in the loss."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    prompt_ids: tuple[int, ...]  # up to the last response: what generation starts from
    prompt: str
    reference: str
    intent: str

    @property
    def labels(self) -> int:
        """Tokens that count in the loss; the first token has no prediction."""
        return sum(self.learned[1:])


@dataclass
class Prepared:
    """The data of one trial, ready to train on and to score."""

    train: list[Example]
    heldout: list[Example]
    facts: dict[str, Any]  # for the result: fingerprints, rows, tokens, dropped rows by reason


class DataCache:
    """Reads and splits every data set of a pack once, however many trials use parts of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._prepared: dict[str, Prepared] = {}
        self._splits: dict[str, Split] = {}

    def prepare(self, data: DataConfig) -> Prepared:
        """Examples for training and for scoring.

        Raises:
            DataError: fewer usable rows than `data.n` or `data.eval_n`.
        """
        known = digest(asdict(data))
        if known not in self._prepared:
            self._prepared[known] = self._read(data)
        return self._prepared[known]

    def _split(self, data: DataConfig) -> Split:
        known = digest({**asdict(data), "n": None})  # subsets are cut from one split
        if known not in self._splits:
            records, held_out = _records(data)
            self._splits[known] = split_records(records, data, held_out)
        return self._splits[known]

    def _read(self, data: DataConfig) -> Prepared:
        split = self._split(data)
        encoded: dict[int, Example | None] = {}

        def usable(row: Row) -> bool:
            if id(row) not in encoded:
                encoded[id(row)] = encode(row, data, self._tokenizer)
            return encoded[id(row)] is not None

        check_enough(split, data, f"data={data.name}", usable)
        dropped = LeftOut.of(split.dropped)
        heldout = _take(split.heldout, data.eval_n, usable, dropped)
        train = _take(split.train, data.train_rows, usable, dropped)
        trained, scored = ([e for r in s if (e := encoded[id(r)])] for s in (train, heldout))
        facts = _facts(trained, scored, dropped)
        everything = [*split.train, *split.heldout]
        facts["overlap_rows"] = count_overlap(train, heldout, everything, data.learn)
        return Prepared(trained, scored, facts)


def _take(
    rows: list[Row], count: int | None, usable: Callable[[Row], bool], dropped: LeftOut
) -> list[Row]:
    """The first `count` rows (None: all) that are usable once they are tokens."""
    taken: list[Row] = []
    for row in rows:
        if len(taken) == count:
            break
        if usable(row):
            taken.append(row)
        else:
            dropped.add("too_long", row.number)
    return taken


def _records(data: DataConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """All records, and those of the held-out set where it is one of its own."""
    if data.source == "hub":
        folder = hub.download(str(data.repo), str(data.identity), "dataset")
        held_out = hub_records(data, folder, "eval_split") if data.eval_split else None
        return hub_records(data, folder), held_out
    found = load_rows(data), load_held_out(data)
    _check_identity(data)
    return found


def _check_identity(data: DataConfig) -> None:
    """A trial's key names the content of its data: refuse any other."""
    if data.identity is not None and content_digest(data) != data.identity:
        raise DataChangedError(
            f"data={data.name} must stay as it was when the sweep was planned, but its file "
            "changed; run the same command again"
        )


def hub_records(data: DataConfig, folder: Path, setting: str = "split") -> list[dict[str, Any]]:
    """Every record of the split `data.<setting>` of a data set that was downloaded to `folder`."""
    import datasets  # late: seconds of import that local files do not need

    split = getattr(data, setting) or "train"
    try:
        loaded = datasets.load_dataset(str(folder), name=data.config, split=split)
    except (ValueError, FileNotFoundError) as error:
        raise DataError(
            f"data.config and data.{setting} must name parts of {data.repo}, got {data.config} "
            f"and {split} ({' '.join(str(error).split())[:200]}); set data.config or "
            f"data.{setting}"
        ) from error
    return list(loaded.to_list())


def encode(row: Row, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Example | None:
    """Token sequence of one row, cut at `data.max_length`; None if no label is left of it."""
    ids: list[int] = []
    learned: list[bool] = []
    prompt_ids: list[int] = []
    segments = render(row, data, tokenizer)
    for number, segment in enumerate(segments):
        # only a plain-text style may want a beginning-of-sequence token; templates bring theirs
        start = number == 0 and data.style != "chat"
        piece = tokenizer(segment.text, add_special_tokens=start)["input_ids"]
        if number == len(segments) - 1:
            prompt_ids = list(ids)
        ids += piece
        learned += [segment.learned or data.mask == "all"] * len(piece)
    ids, learned = ids[: data.max_length], learned[: data.max_length]
    if len(ids) <= len(prompt_ids) or not any(learned[1:]):
        return None
    return Example(
        ids=tuple(ids),
        learned=tuple(learned),
        prompt_ids=tuple(prompt_ids),
        prompt=row.messages[-2].content if row.messages else row.prompt,
        reference=segments[-1].text.removesuffix(str(tokenizer.eos_token)),
        intent=row.intent,
    )


def fingerprint(examples: Iterable[Example]) -> str:
    """Sixteen hex digits over the token ids and the masks, in order."""
    hasher = hashlib.sha256()
    for example in examples:
        hasher.update(repr((example.ids, example.learned)).encode())
    return hasher.hexdigest()[:16]


def _facts(train: list[Example], heldout: list[Example], dropped: LeftOut) -> dict[str, Any]:
    return {
        "train_fingerprint": fingerprint(train),
        "eval_fingerprint": fingerprint(heldout),
        "train_rows": len(train),
        "eval_rows": len(heldout),
        "train_tokens": sum(len(e.ids) for e in train),
        "train_label_tokens": sum(e.labels for e in train),
        "eval_tokens": sum(len(e.ids) for e in heldout),
        "eval_label_tokens": sum(e.labels for e in heldout),
        "train_lengths": length_histogram([len(e.ids) for e in train]),
        "dropped": dropped.facts,
    }


def length_histogram(lengths: Sequence[int]) -> dict[str, list[int]]:
    """How many lengths fall between two neighbouring edges, the lower one included."""
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // _BINS)
    edges = list(range(low, high + width + 1, width))
    counts = Counter((length - low) // width for length in lengths)
    return {"edges": edges, "counts": [counts[place] for place in range(len(edges) - 1)]}
