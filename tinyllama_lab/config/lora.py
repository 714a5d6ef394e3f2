"""The settings of an adapter."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tinyllama_lab.config.targets import (
    EXPRESSION,
    LAYERS,
    TARGET_GROUPS,
    ends_with,
    expression_of,
)
from tinyllama_lab.config.validate import rule
from tinyllama_lab.config.variants import FULL, INITIALISATIONS, VARIANTS

HIGHEST_RANK = 1024
TARGETS = (*TARGET_GROUPS, "all_linear")
OF_BASE = ("bias", "modules_to_save")  # settings that train weights of the base beside A and B
BIASES = ("none", "all", "lora_only")  # words of PEFT


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter. A null `alpha` means 2 r.

    `rank_pattern` gives modules, by name or regular expression, a rank of their own. `bias` and
    `modules_to_save` train weights of the base beside A and B, as PEFT does.
    """

    r: int = rule(least=1, most=HIGHEST_RANK)
    alpha: float | None = rule(above=0)
    dropout: float = rule(least=0, below=1)  # at 1 nothing of the adapter would be left to train
    targets: str | list[str] = rule(choices=TARGETS, prefix=EXPRESSION)
    layers: str | list[int] = rule(example="last_8")
    rank_pattern: dict[str, int] | None = rule(
        least=1, most=HIGHEST_RANK, example="{down_proj: 16}"
    )
    init: str = rule(choices=tuple(INITIALISATIONS))
    variant: str = rule(choices=tuple(VARIANTS), recipe="A LoRA variant")
    bias: str = rule(choices=BIASES)
    modules_to_save: list[str] = rule(example="[embed_tokens,lm_head]")

    def problems(self) -> Iterator[str]:
        """Yield the settings that contradict each other."""
        if self.is_full:  # the others mean nothing
            if self.rank_pattern:
                yield (
                    f"lora.rank_pattern has no effect with lora.variant={self.variant}, got "
                    f"{self.rank_pattern}; leave it out, or set lora.variant=lora"
                )
            return
        if self.targets == []:
            yield "lora.targets must name at least one module, got []; set lora.targets=attention"
        if isinstance(self.layers, str) and not LAYERS.fullmatch(self.layers):
            yield (
                "lora.layers must be all, first_ or last_ and a number, or a list of numbers, got "
                f"{self.layers!r}; set lora.layers={_nearest_layers(self.layers)}"
            )
        if self.layers == []:
            yield "lora.layers must name at least one layer, got []; set lora.layers=all"
        expression = expression_of(self.targets) if isinstance(self.targets, str) else None
        if expression is not None and self.layers != "all":
            yield (
                "lora.layers must be all when lora.targets is an expression, got "
                f"{self.layers!r}; write the numbers of the layers into the expression"
            )
        patterns = [
            ("lora.rank_pattern", text, ends_with(text)) for text in self.rank_pattern or ()
        ]
        if expression:
            patterns.append(("lora.targets", expression, expression))
        yield from (problem for each in patterns if (problem := _unusable(*each)))
        yield from self._problems_of_init()

    def _problems_of_init(self) -> Iterator[str]:
        """Yield what `lora.init` cannot begin with."""
        if INITIALISATIONS[self.init].needs_even_rank and any(rank % 2 for rank in self.ranks):
            yield (
                f"lora.r and lora.rank_pattern must be even when lora.init={self.init}, "
                f"got {', '.join(map(str, sorted(self.ranks)))}; set lora.init=gaussian"
            )
        if self.shifts_base and VARIANTS[self.variant].trains_magnitudes:
            yield (
                f"lora.init={self.init} takes the first B @ A out of the base, whose norms "
                f"lora.variant={self.variant} needs; set lora.init=default"
            )
        if self.reads_rows and self.rank_pattern:
            yield (
                f"lora.rank_pattern must be null when lora.init={self.init}, which gives every "
                f"module the rank lora.r, got {self.rank_pattern}; set lora.init=default"
            )
        if self.shifts_base and self.of_base is not None:
            yield (
                f"lora.init={self.init} needs an adapter that trains A and B alone, got "
                f"{self.of_base}; set lora.init=default"
            )

    def problems_with(self, quant: str, precision: str) -> Iterator[str]:
        """Yield why such adapters cannot be trained on such a base.

        Args:
            quant: `quant.kind`.
            precision: `train.precision`.
        """
        if self.shifts_base and quant != "none":
            yield (
                f"lora.init={self.init} takes the first B @ A out of the base's weights, "
                f"which quant={quant} has rounded; set quant=none, or lora.init=default"
            )
        if self.of_base is None:
            return
        trains = f"{self.of_base} trains weights of the base"
        if precision != "fp32":  # where updates would be lost to rounding
            yield (
                f"{trains}, which needs train.precision=fp32, got {precision}; "
                "set train.precision=fp32"
            )
        if quant != "none":
            yield f"{trains}, which needs quant=none, got {quant}; set quant=none"

    @property
    def is_full(self) -> bool:
        """Whether all weights of the base are trained, and there is no adapter."""
        return VARIANTS[self.variant].is_full

    @property
    def of_base(self) -> str | None:
        """The setting by which weights of the base are trained; None if there is none."""
        if self.is_full:
            return f"lora.variant={self.variant}"
        if self.bias != "none":
            return f"lora.bias={self.bias}"
        return "lora.modules_to_save" if self.modules_to_save else None

    @property
    def not_packed(self) -> str | None:
        """Why its adapters train one at a time, through PEFT; None if they need not."""
        if self.of_base is not None:
            return f"{self.of_base} trains weights of the base, which a pack shares"
        return VARIANTS[self.variant].not_packed

    @property
    def ranks(self) -> set[int]:
        """The ranks that modules have."""
        return {self.r, *(self.rank_pattern or {}).values()}

    @property
    def shifts_base(self) -> bool:
        """Whether the adapter begins with a B @ A that is not zero."""
        return INITIALISATIONS[self.init].shifts_base and not self.is_full

    @property
    def reads_rows(self) -> bool:
        """Whether the first values depend on rows of the training."""
        return INITIALISATIONS[self.init].reads_rows

    @property
    def saved_rank(self) -> int:
        """The highest rank in the saved file, which holds trained and first matrices."""
        return max(self.ranks) * (2 if self.shifts_base else 1)

    @property
    def scale_alpha(self) -> float:
        """The effective alpha."""
        return 2.0 * self.r if self.alpha is None else self.alpha


def full_tuning() -> LoraConfig:
    """Return the settings of a trial without an adapter, of which the variant alone counts."""
    return replace(plain_lora(r=1, targets="all_linear"), alpha=2.0, variant=FULL)


def plain_lora(r: int, targets: str) -> LoraConfig:
    """Return the settings of a plain adapter, for measurements that no trial asked for."""
    return LoraConfig(
        r=r,
        alpha=None,
        dropout=0.0,
        targets=targets,
        layers="all",
        rank_pattern=None,
        init="default",
        variant="lora",
        bias="none",
        modules_to_save=[],
    )


def _nearest_layers(word: str) -> str:
    """Return the valid value of `lora.layers` that is most similar to a word."""
    letters, number = re.sub(r"[\W\d_]+", "", word.lower()), re.search(r"[1-9]\d*", word)
    # without a number, `first` and `last` say how many only by an example
    close = difflib.get_close_matches(letters, ("all", "first", "last"), n=1)
    kind = close[0] if close else "all" if number is None and letters else "last"
    return kind if kind == "all" else f"{kind}_{number[0] if number else 8}"


def _unusable(name: str, typed: str, compiled: str) -> str | None:
    """Return the problem of a regular expression, or None; PEFT compiles more than was typed."""
    try:
        re.compile(compiled)
    except (re.error, OverflowError, RecursionError) as error:
        reason = getattr(error, "msg", error)  # without the place in what was not typed
        return (
            f"{name} must hold regular expressions of Python, got {typed!r}: {reason}; "
            "a module's name alone is one, such as q_proj"
        )
    return None
