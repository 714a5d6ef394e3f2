"""Training as PEFT's manual shows it: one adapter, a padded batch, an optimizer, nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import bitsandbytes
import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Trainer
from transformers.optimization import Adafactor
from transformers.trainer_pt_utils import LabelSmoother

from tinyllama_lab.config.schema import Science, TrainConfig
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed.dropout import mask, noise, row_keys
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.training.step_schedule import batches

# of a Llama
GROUPS = {"attention_qv": ["q_proj", "v_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
# how the manuals of torch, transformers and bitsandbytes make them
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw_8bit": (bitsandbytes.optim.AdamW8bit, {}),
    "adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}),
    "lion": (bitsandbytes.optim.Lion32bit, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}


class Draws:
    """The random numbers of a pack for one adapter, put where PEFT and NEFTune draw theirs."""

    def __init__(self, model: Any, science: Science, examples: Sequence[Example]) -> None:
        """Replace the adapter's dropout, and let the embedding add noise."""
        self._science, self._examples = science, examples
        self._steps = enumerate(batches(len(examples), science.train, science.seed), start=1)
        self._items: list[WorkItem[Any]] = []
        model.register_forward_pre_hook(self._next_step)
        if science.train.neftune_alpha:
            model.get_input_embeddings().register_forward_hook(self._noisy)
        for name, module in model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer) and science.lora.dropout:
                path = name.removeprefix("base_model.model.")
                module.lora_dropout["default"] = Dropout(self, path, science.lora.dropout)

    def _next_step(self, *_: Any) -> None:
        step, rows = next(self._steps)
        alpha = self._science.train.neftune_alpha
        self._items = [
            WorkItem(None, self._examples[row], (self._science.seed, step, n), noise=alpha)
            for n, row in enumerate(rows)
        ]

    def padded(self, values: Callable[[list[WorkItem[Any]]], torch.Tensor]) -> torch.Tensor:
        """Return values of every token, `[batch, seq, width]`; of padding, 0."""
        return nn.utils.rnn.pad_sequence([values([item]) for item in self._items], True)

    def _noisy(self, module: Any, inputs: Any, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings + self.padded(lambda items: noise(items, embeddings.shape[-1]))


class Dropout(nn.Module):
    """Dropout of one module's input."""

    def __init__(self, draws: Draws, path: str, share: float) -> None:
        super().__init__()
        self._of_row = partial(mask, module=path, share=share)
        self._draws = draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self._draws.padded(lambda row: self._of_row(row_keys(row), width=x.shape[-1]))
        return x * kept


def batch_loss(model: Any, chosen: Sequence[Example], smoothing: float) -> torch.Tensor:
    """Return the mean cross entropy of all labels of a padded batch, by transformers."""
    longest = max(len(one.ids) for one in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, one in enumerate(chosen):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        labelled = torch.where(torch.tensor(one.loss_mask), torch.tensor(one.ids), -100)
        labels[row, : len(one.ids)] = labelled
    output = model(input_ids=ids, labels=labels)
    if smoothing:
        smoother = LabelSmoother(epsilon=smoothing)
        smoothed: torch.Tensor = smoother(output, labels, shift_labels=True)
        return smoothed
    loss: torch.Tensor = output.loss
    return loss


def plain_loop(
    base: Base, science: Science, examples: Sequence[Example]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train one trial at a time with PEFT and an optimizer, in the usual way."""
    torch.manual_seed(science.seed)
    config: Any = science.lora
    named = isinstance(config.targets, list)
    wanted: Any = config.targets if named else GROUPS.get(str(config.targets), "all-linear")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=2 * config.r,
        target_modules=wanted,
        init_lora_weights={"pissa": "pissa_niter_16", "default": True}[config.init],
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        bias=config.bias,
        modules_to_save=config.modules_to_save or None,
        ensure_weight_tying=bool(config.modules_to_save and base.model.config.tie_word_embeddings),
    )
    model: Any = peft.get_peft_model(base.model, settings)
    Draws(model, science, examples)
    found = plain_steps(model, science, examples)
    trained = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    values = {name: value.clone() for name, value in trained.items()}
    model.unload()
    return found, values


def plain_steps(model: Any, science: Science, examples: Sequence[Example]) -> list[float]:
    """Train what a model has to train, and return the loss of every step."""
    train = science.train
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind, extra = OPTIMIZERS[train.optimizer]
    options = {"lr": train.lr, "weight_decay": train.weight_decay, **extra}
    if ratio := train.loraplus_ratio:
        options["loraplus_weight_decay"] = options.pop("weight_decay")
        optimizer = create_loraplus_optimizer(model, kind, loraplus_lr_ratio=ratio, **options)
    else:
        decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        both: list[dict[str, Any]] = [{"params": [p for n, p in named if n in decayed]}]
        others = [p for n, p in named if n not in decayed]
        both += [{"params": others, "weight_decay": 0.0}] if others else []
        optimizer = kind(both, **options)
    peaks = [group["lr"] for group in optimizer.param_groups]
    found = []
    for step, rows in enumerate(batches(len(examples), train, science.seed)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, train.max_steps, train)
        loss = batch_loss(model, [examples[row] for row in rows], train.label_smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def schedule(step: int, steps: int, train: TrainConfig) -> float:
    """Return the factor of the learning rate: a tenth of warm-up, then decay to zero."""
    warmup = steps // 10
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (steps - warmup)
    return (1 + math.cos(math.pi * done)) / 2 if train.schedule == "cosine" else 1 - done
