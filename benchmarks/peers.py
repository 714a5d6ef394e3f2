"""The peers: TRL's SFTTrainer with its defaults (P1, P2), and the fastest solo setting (P3)."""

from __future__ import annotations

import gc
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from benchmarks import peer_settings
from benchmarks.job import Adapter, BenchmarkError, Job, Prepared, Round, Trained
from benchmarks.tracking import log_trial
from tinyllama_lab.core.models.loading import load_tokenizer
from tinyllama_lab.core.resident import keep_freed_memory
from tinyllama_lab.metrics import MIB

Rows = Sequence[dict[str, list[int]]]


class Timer(TrainerCallback):
    """Measures the seconds from the start of training to the end of its last step."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        _synchronize()
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _synchronize()
        self.steps += 1
        self.seconds = time.perf_counter() - self._begin


class CountingCollator:
    """A collator that counts the real tokens and the labels of the batches it makes."""

    def __init__(self, collate: Callable[[Any], dict[str, Any]]) -> None:
        self._collate = collate
        self.tokens = 0
        self.labels = 0

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = self._collate(rows)
        mask = batch.get("attention_mask")
        self.tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
        self.labels += int((batch["labels"][:, 1:] != -100).sum())
        return batch


class Peer(ABC):
    """A peer: makes a trainer for each trial, and frees memory after it."""

    def __init__(self, job: Job, prepared: Prepared) -> None:
        self.job, self.prepared = job, prepared
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(Path(prepared.model_folder))
        self.heldout = Dataset.from_list(prepared.heldout)
        self.settings: dict[str, Any] = {}
        self.base_loss: float | None = None  # scored once in a process

    @abstractmethod
    def trainer(self, rows: Rows, adapter: Adapter, batch_size: int, timer: Timer) -> Trainer:
        """Return a trainer with a new adapter."""

    @abstractmethod
    def release(self, trainer: Trainer) -> None:
        """Free the memory of a trial."""

    def arguments(self, adapter: Adapter, batch_size: int) -> dict[str, Any]:
        """Return the trainer arguments that make the work equal."""
        output = str(Path(str(self.job.prepared)).parent / "trainer")  # nothing is saved there
        equal = peer_settings.equal_work(self.job, self.prepared, adapter, batch_size)
        return {"output_dir": output, **equal}


class TrlDefaults(Peer):
    """P1 and P2: SFTTrainer as in its documentation, which loads the base for each trial."""

    def trainer(self, rows: Rows, adapter: Adapter, batch_size: int, timer: Timer) -> Trainer:
        model = {"dtype": self.prepared.dtype}
        options = self.arguments(adapter, batch_size)
        arguments = SFTConfig(**options, model_init_kwargs=model)
        lora = peer_settings.lora_config(adapter, self.job.setup)
        self.settings = peer_settings.shown(arguments, lora, model)
        return SFTTrainer(
            model=self.prepared.model_folder,
            args=arguments,
            train_dataset=Dataset.from_list(list(rows)),
            eval_dataset=self.heldout,
            processing_class=self.tokenizer,
            peft_config=lora,
            callbacks=[timer],
        )

    def release(self, trainer: Trainer) -> None:
        trainer.model = None  # frees the base too; the next trial loads it again


class Strongest(Peer):
    """P3: one base for all trials, no activation checkpointing, batches of similar lengths."""

    def __init__(self, job: Job, prepared: Prepared) -> None:
        super().__init__(job, prepared)
        self.variant = peer_settings.Variant.parse(job.variant)
        options = peer_settings.load_options(job, prepared)
        self.base = AutoModelForCausalLM.from_pretrained(prepared.model_folder, **options)
        self.base.config.use_cache = False
        self.model = {**{k: str(v) for k, v in options.items()}, "variant": job.variant}

    def trainer(self, rows: Rows, adapter: Adapter, batch_size: int, timer: Timer) -> Trainer:
        torch.manual_seed(adapter.seed)
        options = self.arguments(adapter, batch_size)
        options |= peer_settings.strongest(self.job, batch_size)
        lora = peer_settings.lora_config(adapter, self.job.setup)
        grouped = Dataset.from_list(group_by_length(rows, batch_size, adapter.seed))
        shared: dict[str, Any] = {
            "train_dataset": grouped,
            "eval_dataset": self.heldout,
            "processing_class": self.tokenizer,
            "callbacks": [timer],
        }
        flat = peer_settings.padding_free(self.job)
        arguments: TrainingArguments
        made: Trainer
        if self.variant.trainer == "trl":
            arguments = SFTConfig(**options, padding_free=flat, max_length=None)
            made = SFTTrainer(model=self.base, args=arguments, peft_config=lora, **shared)
        else:
            import peft

            arguments = TrainingArguments(**options)
            adapted: Any = peft.get_peft_model(self.base, lora)
            collator: Any = DataCollatorForSeq2Seq(self.tokenizer)
            if flat:
                collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
            made = Trainer(model=adapted, args=arguments, data_collator=collator, **shared)
        model = {**self.model, "padding_free": flat}
        self.settings = peer_settings.shown(arguments, lora, model)
        return made

    def release(self, trainer: Trainer) -> None:
        model: Any = trainer.model
        model.unload()
        self.base.__dict__.pop("forward", None)  # each TRL trainer wraps it in another patch


def group_by_length(rows: Rows, batch_size: int, seed: int) -> list[dict[str, list[int]]]:
    """Order rows into batches of similar length, shuffled, which minimises the padding."""
    longest_first = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    starts = list(range(0, len(rows), batch_size))
    tail = starts.pop() if len(rows) % batch_size else None  # an incomplete batch must come last
    random.Random(seed).shuffle(starts)
    order = [*starts, *([tail] if tail is not None else [])]
    return [row for start in order for row in longest_first[start : start + batch_size]]


def run(job: Job, prepared: Prepared) -> tuple[list[Trained], dict[str, Any], float | None]:
    """Train the trials of every round one after the other.

    Returns the measurements of each round, the settings, and on CUDA the peak memory in MiB.
    """
    if job.arm == "P3":
        keep_freed_memory()
    peer = Strongest(job, prepared) if job.arm == "P3" else TrlDefaults(job, prepared)
    first = next(job.rounds[0].grid.adapters())
    if not job.keep:  # a warm-up; in a whole sweep the first step counts, as it does for a user
        size = job.rounds[0].batch_size
        _train(peer, prepared.train[:size], first, size)
    rounds = [_round(peer, round_) for round_ in job.rounds]
    cuda = job.setup.device == "cuda"
    return rounds, peer.settings, torch.cuda.max_memory_allocated() / MIB if cuda else None


def _round(peer: Peer, round_: Round) -> Trained:
    rows = peer.prepared.train[: round_.rows]
    total = Trained(adapters=0, batch_size=round_.batch_size)
    for adapter in round_.grid.adapters():
        timer, collator, loss = _train(peer, rows, adapter, round_.batch_size)
        total.adapters += 1
        total.tokens += collator.tokens
        total.labels += collator.labels
        total.steps += timer.steps
        total.seconds += timer.seconds
        total.losses.append(loss)
    return total


def _train(
    peer: Peer, rows: Rows, adapter: Adapter, batch_size: int
) -> tuple[Timer, CountingCollator, float]:
    timer = Timer()
    trainer = peer.trainer(rows, adapter, batch_size, timer)
    made: Any = trainer
    collate = made.data_collator
    made.data_collator = collator = CountingCollator(collate)
    loss = trainer.train().training_loss
    if timer.steps != -(-len(rows) // batch_size):
        raise BenchmarkError(f"one pass over {len(rows)} rows expected, got {timer.steps} steps")
    made.data_collator = collate
    if peer.job.keep:
        _finish(peer, trainer, Path(peer.job.keep), adapter, loss)
    peer.release(trainer)
    del trainer
    gc.collect()
    return timer, collator, loss


def _finish(peer: Peer, trainer: Trainer, folder: Path, adapter: Adapter, loss: float) -> None:
    """Save the adapter, score it and the base, and log both, as a sweep does."""
    model: Any = trainer.model
    name = f"r{adapter.r}-{adapter.targets}-lr{adapter.lr}-seed{adapter.seed}"
    model.save_pretrained(str(folder / name))
    metrics = {"train_loss": loss, "eval_loss": trainer.evaluate()["eval_loss"]}
    if peer.base_loss is None:
        with model.disable_adapter():
            peer.base_loss = trainer.evaluate()["eval_loss"]
    metrics["base_loss"] = peer.base_loss
    log_trial(folder, name, adapter, metrics, trainer.state.log_history)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
