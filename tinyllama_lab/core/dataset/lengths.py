"""Whether sequences, and what is written after prompts, fit the positions of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.errors import DataError, TooLongError

# the examples whose prompts are continued, and by how many tokens, by the setting that says so
Continued = Mapping[str, tuple[Sequence[Example], int]]


def too_few(positions: int) -> str:
    """Return the advice if no `data.max_length` makes room for an answer."""
    return f"shorten the prompts, or take a model with more than {positions} positions"


def check_lengths(examples: Sequence[Example], positions: int | None) -> None:
    """Refuse sequences that are longer than the model supports.

    Raises:
        TooLongError: the longest sequence exceeds `positions`, and some rows would fit.
        DataError: no row would fit.
    """
    longest = max(examples, key=lambda example: len(example.ids))
    if positions is None or len(longest.ids) <= positions:
        return
    problem = (
        f"a sequence must fit the model's {positions} positions, got one of {len(longest.ids)} "
        f"tokens (row {longest.number})"
    )
    fit = sum(len(example.prompt_ids) < positions for example in examples)
    if not fit:
        raise DataError(f"{problem}; {too_few(positions)}")
    left_out = f", which leaves out {len(examples) - fit} of {len(examples)} rows"
    raise TooLongError(problem, positions, left_out if fit < len(examples) else "")


def room_after_prompts(continued: Continued, positions: int | None) -> dict[str, int]:
    """Return the highest values of those settings that exceed the room after the prompts."""
    room = {}
    for setting, (examples, new_tokens) in continued.items():
        longest = _longest(examples)
        if positions is not None and examples and longest + new_tokens > positions:
            room[setting] = positions - longest  # above 0: a sequence is longer than its prompt
    return room


def check_room(continued: Continued, positions: int | None) -> None:
    """Refuse prompts that leave no room for what is written after them.

    Raises:
        DataError: with the values for which there is room.
    """
    if room := room_after_prompts(continued, positions):
        longest = max(_longest(continued[setting][0]) for setting in room)
        got = " and ".join(f"{setting}={continued[setting][1]}" for setting in room)
        raise DataError(
            f"a prompt and what is written after it must fit the model's {positions} positions, "
            f"got a prompt of {longest} tokens and {got}; set "
            + " ".join(f"{setting}={most}" for setting, most in room.items())
        )


def _longest(examples: Sequence[Example]) -> int:
    return max((len(example.prompt_ids) for example in examples), default=0)
