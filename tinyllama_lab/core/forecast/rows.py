"""The rows of a trial as tokens, or estimated if they are not on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from tinyllama_lab.config.schema import ALL, ModelConfig, Science
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.core.evaluation.losses import general_examples
from tinyllama_lab.core.models.loading import model_folder, read_tokenizer, repo_to_download
from tinyllama_lab.core.training.step_schedule import batches, rows_seen, steps_of

SUPERVISED = 0.5  # share of the tokens of an estimated row; about that of chats
GUESSED_ALL = 1000  # rows of `data.n=all` of a set that nobody has counted; the driver says so
ROUNDS = 8  # of a pack that are laid out; later ones are as large as the largest of them
_COUNTED = 20_000  # rows whose tokens are added up one by one


@dataclass(frozen=True, eq=False)  # to be compared and hashed as one object, fast
class Rows:
    """The training and held-out rows of a trial."""

    train: Sequence[Example]
    heldout: Sequence[Example]
    general: Sequence[Example]  # unrelated text, if it is scored as well
    is_counted: bool  # whether a tokenizer made them
    is_guessed: bool = False  # whether even their number is not known

    @cached_property
    def longest(self) -> Example:
        """The training row with the most tokens."""
        return max(self.train, key=lambda example: len(example.ids))

    def cut(self, length: int) -> Rows:
        """Return the rows, cut at `length` tokens."""
        shorter = {
            id(e): replace(e, ids=e.ids[:length], loss_mask=e.loss_mask[:length])
            for e in self.train
        }
        return replace(self, train=[shorter[id(e)] for e in self.train])

    def steps(self, science: Science) -> list[list[Example]]:
        """Return the rows of the first steps."""
        order = batches(len(self.train), science.train, science.seed)
        return [[self.train[row] for row in rows] for rows in islice(order, ROUNDS)]

    def step_count(self, science: Science) -> int:
        """Return the number of steps."""
        return steps_of(len(self.train), science.train)

    def tokens(self, science: Science) -> int:
        """Return the tokens of all steps."""
        seen = rows_seen(len(self.train), science.train)
        if seen > _COUNTED or not self.is_counted:
            return round(seen * sum(len(e.ids) for e in self.train) / len(self.train))
        order = batches(len(self.train), science.train, science.seed)
        return sum(len(self.train[row].ids) for rows in order for row in rows)


class RowSource:
    """Reads rows with the tokenizers that are on this machine, each once."""

    def __init__(self, config: Callable[[ModelConfig], object]) -> None:
        """`config` reads the configuration of a base, or says what is wrong with it."""
        self._config = config
        self._caches: dict[str, DataCache | None] = {}
        self._general: dict[str, list[Example]] = {}
        self._rows: dict[str, Rows] = {}

    def rows(self, science: Science, estimate: Mapping[str, float]) -> Rows:
        """Return the rows of a trial; trials of the same data and seed share them.

        Args:
            science: its settings.
            estimate: `mean` and `longest` tokens of a row, and `rows` in all, used where the
                tokenizer or the data is not on this machine.

        Raises:
            DataError: the rows are here and cannot be used.
        """
        settings = (science.model, science.data, science.seed, science.eval.general)
        key = repr((settings, dict(estimate)))
        if key not in self._rows:
            self._rows[key] = self._read(science, estimate)
        return self._rows[key]

    def _read(self, science: Science, estimate: Mapping[str, float]) -> Rows:
        cache = self._cache(science.model)
        if cache is None or science.data.kind.is_remote:
            return _estimated(science, estimate)
        examined = cache.examine(science.data, science.seed)
        train, heldout = map(examined.examples, (examined.train, examined.heldout))
        if not (train and heldout):
            return _estimated(science, estimate)
        return Rows(train, heldout, self._unrelated(science, cache), True)

    def _unrelated(self, science: Science, cache: DataCache) -> list[Example]:
        """Return the passages of unrelated text, if they are scored."""
        key = repr(science.model)
        if science.eval.general and key not in self._general:
            self._general[key] = general_examples(cache)
        return self._general[key] if science.eval.general else []

    def _cache(self, model: ModelConfig) -> DataCache | None:
        key = repr(model)
        if key not in self._caches:
            is_here = repo_to_download(model) is None and has_tokenizer(model)
            if is_here:
                self._config(model)  # first, since its messages name the field
            self._caches[key] = DataCache(*read_tokenizer(model)) if is_here else None
        return self._caches[key]


def has_tokenizer(model: ModelConfig) -> bool:
    """Return whether a model that needs no download has a tokenizer to read."""
    folder = model_folder(model)
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _estimated(science: Science, estimate: Mapping[str, Any]) -> Rows:
    """Return one longest row, and the others of the mean length."""
    known = int(estimate.get("rows") or 0)
    count = (known or GUESSED_ALL) if science.data.n == ALL else int(science.data.n)
    is_guessed = science.data.n == ALL and not known
    most = science.data.max_length
    mean = max(2, round(min(most, estimate.get("mean") or most)))
    longest = max(mean, round(min(most, estimate.get("longest") or most)))
    train = [_row(longest), *[_row(mean)] * (count - 1)]
    return Rows(train, [_row(mean)] * science.data.eval_n, [], False, is_guessed)


def _row(tokens: int) -> Example:
    prompt = max(1, round(tokens * (1 - SUPERVISED)))
    mask = (False,) * prompt + (True,) * (tokens - prompt)
    return Example((0,) * tokens, mask, (0,) * prompt, "", "", "")
