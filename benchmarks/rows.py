"""Computes what all arms share: token ids with their labels, and the sizes of the model."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import command, tinyllama
from benchmarks.job import RANDOM_TINYLLAMA, Grid, Job, Prepared, Round
from tinyllama_lab.core.dataset.dataset import DataCache, Example
from tinyllama_lab.core.meter import environment
from tinyllama_lab.core.models.loading import load_tokenizer, model_folder, pick_device, pick_dtype
from tinyllama_lab.data.cache import cache_dir
from tinyllama_lab.sweep.plan import check_cells


def prepare(job: Job) -> Prepared:
    """Tokenise the rows as the project does, and make the random TinyLlama if it is needed."""
    if job.setup.model_path == str(cache_dir() / RANDOM_TINYLLAMA):
        tinyllama.folder()
    setup = job.setup
    one = Round(Grid(), setup.rows, 1)
    config = check_cells(command.cells(setup, one))[0]
    device = pick_device(setup.device)
    dtype = pick_dtype(config.train.precision, device)
    folder = model_folder(config.model)
    data = DataCache(load_tokenizer(folder)).prepare(config.data)
    linears, head = linear_shapes(folder)
    machine = environment(device, dtype, "resident set, sum over processes")
    return Prepared(
        train=[_row(example) for example in data.train],
        heldout=[_row(example) for example in data.heldout],
        model_folder=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        linears=linears,
        head=head,
        machine={**machine, "cores": os.cpu_count(), "load_average": os.getloadavg()[0]},
        model={"name": setup.model, "data": config.data.name, **data.facts},
    )


def linear_shapes(folder: Path) -> tuple[list[tuple[int, int, int]], int]:
    """Return the shapes of the blocks' linear layers, and the number of parameters of the head.

    A shape is (out features, in features, number of layers with this shape).
    """
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):  # shapes only, no memory
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    shapes = Counter(
        (module.out_features, module.in_features)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    return [(*shape, count) for shape, count in sorted(shapes.items())], head.weight.numel()


def _row(example: Example) -> dict[str, list[int]]:
    pairs = zip(example.ids, example.loss_mask, strict=True)
    return {
        "input_ids": list(example.ids),
        "labels": [token if supervised else -100 for token, supervised in pairs],
    }
