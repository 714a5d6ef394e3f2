"""The peaks of a pack, and whether it fits, by the worker's own planner."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from tinyllama_lab.config.lora import LoraConfig, plain_lora
from tinyllama_lab.config.schema import HardwareConfig, Science
from tinyllama_lab.config.targets import expression_of
from tinyllama_lab.core.context import WorkerContext, gpu_tokens
from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.core.engines.base import Engine, WorkItem
from tinyllama_lab.core.engines.generate import head_size
from tinyllama_lab.core.engines.packed.engine import CACHE_SHARE, PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation.load import Scored, losses_load, scoring_load
from tinyllama_lab.core.forecast.adapter_size import adapter_size
from tinyllama_lab.core.forecast.machine import Machine
from tinyllama_lab.core.forecast.rows import ROUNDS, Rows
from tinyllama_lab.core.forecast.trace import kept_mib_per_token
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.models.outline import Outline
from tinyllama_lab.core.out_of_memory import is_out_of_memory
from tinyllama_lab.core.resident import kernels_kept
from tinyllama_lab.core.training.best_step import mib_with_best
from tinyllama_lab.core.training.memory import Planner
from tinyllama_lab.core.training.micro_batch import MicroBatchSize
from tinyllama_lab.metrics import MIB
from tinyllama_lab.study.evaluations import checks_every


@dataclass(frozen=True)
class Trial:
    """A trial with its rows."""

    science: Science
    rows: Rows

    @property
    def size(self) -> Hashable:
        """All that its memory depends on: grids often differ in the learning rate alone."""
        train = replace(self.science.train, lr=0.0)
        return repr(replace(self.science, train=train)), self.rows


@dataclass(frozen=True)
class PackForecast:
    """What a pack will need; MiB.

    Attributes:
        fits: whether each of its trials fits, at least alone.
        together: how many adapters train at a time.
        micro_batch_tokens: of the largest micro-batch.
        gradient_checkpointing: whether activations are recomputed.
        train_peak_mib: allocated on a GPU, resident on a CPU.
        infer_peak_mib: the same while the adapters are scored.
        free_mib: what the worker may take beside its base.
        needs_mib: what its largest trial needs alone, with every remedy of the worker.
        phase: that needs it, training or scoring.
    """

    fits: list[bool]
    together: int
    micro_batch_tokens: int
    gradient_checkpointing: bool
    train_peak_mib: float
    infer_peak_mib: float
    free_mib: float
    needs_mib: float
    phase: str


@dataclass(frozen=True)
class Need:
    """MiB beside the base that a trial needs alone, with every remedy of the worker."""

    training: float
    scoring: float

    @property
    def most(self) -> float:
        """What the larger phase needs."""
        return max(self.training, self.scoring)

    @property
    def phase(self) -> str:
        """The phase that needs more."""
        return "scoring" if self.scoring > self.training else "training"


@dataclass(frozen=True)
class _Held:
    """What `PeakMemory.now_mib` would say once the base is loaded."""

    mib: float

    def now_mib(self) -> float:
        return self.mib


class _Planner(Planner):
    """The worker's planner, with the free memory of a machine."""

    def __init__(self, context: WorkerContext, engine: Engine[Any], free: float) -> None:
        super().__init__(context, engine)
        self._free = free

    def _free_mib(self) -> float:
        return self._free


class Forecaster:
    """Forecasts packs on one base."""

    def __init__(
        self, outline: Outline, hardware: HardwareConfig, machine: Machine, stored: str
    ) -> None:
        """`stored` is `Base.weights`, by which measured speeds are found."""
        self._outline, self._machine = outline, machine
        self._hardware = hardware
        model, tokenizer = outline.model, cast(Any, None)  # rows are tokens already
        parameters = sum(p.numel() for p in model.parameters())
        self._base = Base(
            model, tokenizer, machine.device, outline.dtype, parameters, weights=stored
        )
        keeps = hardware.keep_dequantized and outline.quant.kind in ("nf4", "fp4")
        self.weights_mib = outline.weights_mib + (outline.dense_mib() if keeps else 0.0)
        self.baseline_mib = machine.process_mib + self.weights_mib
        self.room_mib = machine.free_mib - self.baseline_mib
        # what trials share, because each takes a walk through the base
        self._kept: dict[str, dict[int, float]] = {}  # MiB a token, by rank
        self._engines: dict[tuple[bool, bool], Engine[Any]] = {}
        self._sizes: dict[str, tuple[int, float]] = {}
        self._adapters_mib: dict[str, float] = {}
        self._needs: dict[Hashable, Need] = {}
        self._alone: dict[Hashable, PackForecast] = {}

    @property
    def dtype(self) -> torch.dtype:
        """What the base computes in."""
        return self._base.dtype

    @property
    def parameters(self) -> int:
        """Values of the base."""
        return self._base.parameters

    @cached_property
    def block_parameters(self) -> int:
        """Values that every token is multiplied with: those of the blocks, without the head."""
        model = self._base.model
        outer = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
        kept = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in outer]
        return sum(module.in_features * module.out_features for module in kept)

    def is_packed(self, lora: LoraConfig) -> bool:
        """Return whether adapters of this kind train together."""
        return lora.not_packed is None and self._base_is_packed

    @cached_property
    def _base_is_packed(self) -> bool:
        """Whether a pass of packed rows runs on the base; a worker compares it with PEFT's too."""
        if self._outline.quant.kind == "int8":
            return False
        lora = plain_lora(r=2, targets="all_linear")
        row = Example((0,) * 4, (True,) * 4, (0,), "", "", "")
        try:
            kept_mib_per_token(self._outline, lora, row, packed=True, is_gpu=False)
        except Exception as error:  # a worker, too, then trains one adapter at a time
            if is_out_of_memory(error):
                raise
            return False
        return True

    def size(self, lora: LoraConfig) -> tuple[int, float]:
        """Return the trained values of an adapter, and MiB of its file."""
        key = repr(lora)
        if key not in self._sizes:
            self._sizes[key] = adapter_size(self._base.model, lora)
        return self._sizes[key]

    def forecast(self, trials: Sequence[Trial]) -> PackForecast:
        """Return what a pack will need."""
        science, engine = trials[0].science, self._engine(trials[0].science)
        planner, context = self._planner(engine, trials)
        sizes = [self._training_mib(engine, each.science) for each in trials]
        longest = max(len(each.rows.longest.ids) for each in trials)
        together = planner.plan_training(sizes, longest, science.train.deterministic)
        needs = [self.need(trial) for trial in trials]
        most = max(needs, key=lambda need: need.most)
        # a worker plans with the first trial, but tokens of larger adapters keep more
        planner.assume(max(map(self._kept_per_token, trials)))
        # trials leave and others join, so the largest meet
        trials = sorted(trials, key=lambda t: -self._training_mib(engine, t.science))
        sizes = sorted(sizes, reverse=True)[:together]
        laid_out = list(self._steps(engine, planner, context, trials[:together]))
        if together < len(trials):
            of_length = sorted(trials, key=lambda trial: -len(trial.rows.longest.ids))
            laid_out += self._steps(engine, planner, context, of_length[:together])
        for micro_batches in laid_out:
            planner.predict(sizes, micro_batches)
        steps = max(each.rows.step_count(each.science) for each in trials)
        if steps > ROUNDS:  # the others are as large, and come after more of them
            shapes = len({tokens for step in laid_out for tokens in step})
            planner.pass_over(round((steps - ROUNDS) / ROUNDS * shapes))
            planner.predict(sizes, max(laid_out, key=max))
        if any(checks_every(vars(each.science.train), steps) for each in trials):
            work = [(object(), each.rows.heldout) for each in trials[:together]]
            load = losses_load(engine, work, 2 * context.micro_batch_tokens)
            planner.predict_checks(sizes, load)
        return PackForecast(
            [need.most <= self.room_mib for need in needs],
            together,
            max(map(max, laid_out)),
            planner.checkpointing,
            planner.predicted()["memory/predicted_mib"],
            self._scoring(engine, planner, context, trials[:together]),
            self.room_mib,
            most.most,
            most.phase,
        )

    def fits(self, trial: Trial) -> bool:
        """Return whether a trial fits alone, in training and in scoring."""
        return self.need(trial).most <= self.room_mib

    def alone(self, trial: Trial) -> PackForecast:
        """Return what a trial needs in a pack of its own."""
        if (key := trial.size) not in self._alone:
            self._alone[key] = self.forecast([trial])
        return self._alone[key]

    def need(self, trial: Trial) -> Need:
        """Return what a trial needs alone, with every remedy of the worker."""
        if (key := trial.size) not in self._needs:
            self._needs[key] = self._need(trial)
        return self._needs[key]

    def _need(self, trial: Trial) -> Need:
        engine = self._engine(trial.science)
        planner, context = self._planner(engine, [trial])
        adapter_mib = self._training_mib(engine, trial.science)
        longest, fixed = len(trial.rows.longest.ids), trial.science.train.deterministic
        planner.plan_training([adapter_mib], longest, fixed)
        training = planner.predicted_alone(adapter_mib)["memory/alone_mib"]
        scoring = self._scoring(engine, planner, context, [trial], self._machine.is_gpu)
        return Need(*(max(0.0, mib - self.baseline_mib) for mib in (training, scoring)))

    def _training_mib(self, engine: Engine[Any], science: Science) -> float:
        adapter_mib = self._adapter_mib(engine, science.lora)
        return mib_with_best(adapter_mib, science.train, self._machine.device)

    def _adapter_mib(self, engine: Engine[Any], lora: LoraConfig) -> float:
        """Return MiB of an adapter in training; its settings decide the engine."""
        if (key := repr(lora)) not in self._adapters_mib:
            self._adapters_mib[key] = engine.adapter_mib(lora)
        return self._adapters_mib[key]

    def _engine(self, science: Science) -> Engine[Any]:
        """Return the engine of a trial. A forecast changes no state that another would read."""
        key = self.is_packed(science.lora), science.train.deterministic
        if key not in self._engines:
            self._engines[key] = self._new_engine(science)
        return self._engines[key]

    def _new_engine(self, science: Science) -> Engine[Any]:
        if not self.is_packed(science.lora):
            return PeftEngine(self._base)
        cache = max(0, int(CACHE_SHARE * self.room_mib)) if self._machine.is_gpu else None
        mixed = not science.train.deterministic
        return PackedEngine(self._base, mixed, triton=False, cache_mib=cache)

    def _planner(
        self, engine: Engine[Any], trials: Sequence[Trial]
    ) -> tuple[_Planner, WorkerContext]:
        hardware, tokens = self._hardware, self._hardware.micro_batch_tokens
        if self._machine.is_gpu and tokens is None:
            total_bytes = int(self._machine.total_mib * MIB)
            hardware = replace(hardware, micro_batch_tokens=gpu_tokens(total_bytes))
        held: Any = _Held(self.baseline_mib)
        data: Any = None  # rows are read already
        context = WorkerContext(self._base, data, hardware, held, "", lambda: False)
        context.kernels = kernels_kept(len(trials))
        planner = _Planner(context, engine, self.room_mib)
        planner.assume(self._kept_per_token(trials[0]))
        return planner, context

    def _kept_per_token(self, trial: Trial) -> float:
        """Return MiB that a token keeps for backward.

        It grows in proportion to the rank, so two ranks are traced and the others computed.
        """
        lora, longest = _of_any_layer(trial.science.lora), trial.rows.longest
        packed = self.is_packed(lora)
        alike = asdict(lora) | {"r": None, "alpha": None}
        key = repr((alike, len(longest.ids), longest.labels, packed))
        by_rank = self._kept.setdefault(key, {})
        if lora.r not in by_rank and len(by_rank) > 1:
            (rank, kept), (other, more) = list(by_rank.items())[:2]
            return kept + (more - kept) / (other - rank) * (lora.r - rank)
        if lora.r not in by_rank:
            is_gpu = self._machine.is_gpu
            kept = kept_mib_per_token(self._outline, lora, longest, packed, is_gpu)
            if is_gpu and packed and not self._machine.has_varlen:
                kept += self._repeated_keys_mib()
            by_rank[lora.r] = kept
        return by_rank[lora.r]

    def _repeated_keys_mib(self) -> float:
        """Return MiB a token of what attention on older GPUs keeps in addition.

        PyTorch's kernel there wants as many keys and values as queries, and keeps its result.
        """
        config: Any = self._outline.model.config
        values = config.num_attention_heads * head_size(config) * config.num_hidden_layers
        return 3 * values * self._outline.dtype.itemsize / MIB

    def _steps(
        self,
        engine: Engine[Any],
        planner: Planner,
        context: WorkerContext,
        trials: Sequence[Trial],
    ) -> Iterator[list[int]]:
        """Yield the tokens of every micro-batch, for each of the first steps."""
        size, hardware = MicroBatchSize(context), context.hardware
        steps = [trial.rows.steps(trial.science) for trial in trials]
        owners = [object() for _ in trials]
        for number in range(max(map(len, steps))):
            items = [
                WorkItem(owner, example)
                for owner, rows in zip(owners, steps, strict=True)
                for example in (rows[number] if number < len(rows) else [])
            ]
            tokens = sum(len(item.example.ids) for item in items)
            limit = size.next(tokens, planner.micro_batch_sizes)
            if planner.micro_batch_sizes and not (size.is_chosen or hardware.micro_batch_tokens):
                limit = planner.micro_batch_sizes[-1]  # its turn comes
            batches = engine.micro_batches(items, limit)
            yield [sum(len(item.example.ids) for item in batch) for batch in batches]

    def _scoring(
        self,
        engine: Engine[Any],
        planner: Planner,
        context: WorkerContext,
        trials: Sequence[Trial],
        least: bool = False,
    ) -> float:
        """Return the peak of scoring: optimizer states are gone, and nothing is kept.

        With `least`, as after errors of memory on a GPU: an example and a prompt at a time. On a
        CPU the kernel ends a worker that takes too much, so it has no such remedy.
        """
        together = trials[: engine.max_concurrent or len(trials)]
        sizes = [self._adapter_mib(engine, trial.science.lora) for trial in together]
        scored = [
            Scored(owner, trial.rows.heldout, trial.rows.general, trial.science.eval)
            for owner, trial in [(None, together[0]), *((object(), each) for each in together)]
        ]
        limit = 2 * context.micro_batch_tokens
        return planner.scoring_mib(sizes, scoring_load(self._base, engine, scored, limit, least))


def _of_any_layer(lora: LoraConfig) -> LoraConfig:
    """Return settings that adapt every layer, for a model of one or two that stands for all.

    What tokens keep for adapters that are not there, or have a lower rank, is then counted too.
    """
    targets = lora.targets
    if not isinstance(targets, str):
        targets = _in_any_layer(targets)
    elif expression_of(targets) is not None:
        targets = "all_linear"
    # the frozen pair of a shifted initialisation keeps as much as a second adapter
    return replace(
        lora,
        layers="all",
        targets=targets,
        r=lora.saved_rank,
        rank_pattern=None,
        init="default",
        modules_to_save=_in_any_layer(lora.modules_to_save),
    )


def _in_any_layer(names: Sequence[str]) -> list[str]:
    """Return names of modules without the numbers of their layers."""
    return sorted({n.rpartition(".")[2] if re.search(r"\d\.", n) else n for n in names})
