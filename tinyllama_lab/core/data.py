"""From rows to masked token sequences: what is trained on, what is scored, and their prints."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tinyllama_lab import hub
from tinyllama_lab.config import DataConfig
from tinyllama_lab.core.prompts import render
from tinyllama_lab.errors import DataError
from tinyllama_lab.formats import recognise
from tinyllama_lab.readers import arrow_records
from tinyllama_lab.rows import Row, to_rows
from tinyllama_lab.sources import content_digest, load_rows
from tinyllama_lab.splits import Split, check_enough, normalise, split_rows
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
        self._splits: dict[str, tuple[Split, DataConfig]] = {}

    def prepare(self, data: DataConfig) -> Prepared:
        """Examples for training and for scoring.

        Raises:
            DataError: fewer usable rows than `data.n` or `data.eval_n`.
        """
        known = digest(asdict(data))
        if known not in self._prepared:
            self._prepared[known] = self._read(data)
        return self._prepared[known]

    def _split(self, data: DataConfig) -> tuple[Split, DataConfig]:
        known = digest({**asdict(data), "n": None})  # subsets are cut from one split
        if known not in self._splits:
            if data.source == "hub":
                folder = hub.download(str(data.repo), str(data.identity), "dataset")
                records = hub_records(data, folder)
            else:
                records = load_rows(data)
                _check_identity(data)
            data, _ = recognise(records, data)  # columns that are still null: of the hub
            rows, unusable = to_rows(records, data)
            self._splits[known] = split_rows(rows, data, unusable), data
        return self._splits[known]

    def _read(self, data: DataConfig) -> Prepared:
        split, recognised = self._split(data)
        data = replace(data, columns=recognised.columns, style=recognised.style)
        dropped = Counter(split.dropped)
        heldout = self._take(split.heldout, data.eval_n, data, dropped)
        train = self._take(split.train, data.train_rows, data, dropped)
        usable = Split([row for row, _ in train], [row for row, _ in heldout], dropped)
        check_enough(usable, data, f"data={data.name}")
        trained, scored = [e for _, e in train], [e for _, e in heldout]
        facts = _facts(trained, scored, dropped)
        facts["overlap_rows"] = count_overlap(usable.train, usable.heldout)
        return Prepared(trained, scored, facts)

    def _take(
        self, rows: list[Row], count: int | None, data: DataConfig, dropped: Counter[str]
    ) -> list[tuple[Row, Example]]:
        """The first `count` rows (None: all) that are usable once they are tokens."""
        taken: list[tuple[Row, Example]] = []
        for row in rows:
            if len(taken) == count:
                break
            example = encode(row, data, self._tokenizer)
            if example is None:
                dropped["too_long"] += 1
            else:
                taken.append((row, example))
        return taken


def _check_identity(data: DataConfig) -> None:
    """A trial's key names the content of its data: refuse any other."""
    if data.identity is not None and content_digest(data) != data.identity:
        raise DataError(
            f"data={data.name} must stay as it was when the sweep was planned, but its file "
            "changed; run the same command again"
        )


def hub_records(data: DataConfig, folder: Path) -> list[dict[str, Any]]:
    """Every record of a data set of the hub that was downloaded to `folder`."""
    import datasets  # late: seconds of import that local files do not need

    split = data.split or "train"
    try:
        loaded = datasets.load_dataset(str(folder), name=data.config, split=split)
    except (ValueError, FileNotFoundError) as error:
        raise DataError(
            f"data.config and data.split must name parts of {data.repo}, got {data.config} and "
            f"{split} ({' '.join(str(error).split())[:200]}); set data.config or data.split"
        ) from error
    return arrow_records(loaded.with_format("arrow")[:])


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


def _facts(train: list[Example], heldout: list[Example], dropped: Counter[str]) -> dict[str, Any]:
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
        "dropped": dict(sorted(dropped.items())),
    }


def count_overlap(train: Sequence[Row], heldout: Sequence[Row]) -> int:
    """Training rows whose prompt and response, but for spelling, are those of a held-out one.

    The split leaves none. This looks at what came of it, and shares only the spelling with it.
    """
    known = {_spelled(row) for row in heldout}
    return sum(_spelled(row) in known for row in train)


def _spelled(row: Row) -> tuple[str, ...]:
    asked = [f"{turn.role} {turn.content}" for turn in row.messages[:-1]] or [row.prompt]
    return tuple(normalise(text) for text in (row.context, *asked, row.response))


def length_histogram(lengths: Sequence[int]) -> dict[str, list[int]]:
    """How many lengths fall between two neighbouring edges, the lower one included."""
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // _BINS)
    edges = list(range(low, high + width + 1, width))
    counts = Counter((length - low) // width for length in lengths)
    return {"edges": edges, "counts": [counts[place] for place in range(len(edges) - 1)]}
