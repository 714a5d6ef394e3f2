"""Reads the loss of every example that a trial was scored on, from the file of its evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllama_lab.report.analysis.statistics import Array, Ids


class Losses(NamedTuple):
    """The losses of all examples, `[examples]` each."""

    nats: Array  # losses, summed over the supervised tokens
    tokens: Array  # number of supervised tokens
    clusters: Ids  # equal for examples that belong together
    bytes: Array | None  # of the supervised text, UTF-8; None in files of earlier versions


def read_losses(path: Path) -> Losses | None:
    """Read the losses of every example; None if the file is missing or damaged.

    Examples of one cluster belong together; an example without that field is its own cluster.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        nats = np.array([float(record["loss"]) for record in records])
        tokens = np.array([float(record["tokens"]) for record in records])
        clusters = np.array(  # recorded clusters count from 0, so negative ids never collide
            [int(record.get("cluster", -1 - n)) for n, record in enumerate(records)]
        )
        sizes = np.array([float(record.get("bytes", 0)) for record in records])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # without one example, a mean would be over other rows than that of the other trials
    if not len(nats) or not np.isfinite(nats).all() or not (tokens > 0).all():
        return None
    has_bytes = bool((sizes >= 0).all() and sizes.sum() > 0)
    return Losses(nats, tokens, clusters, sizes if has_bytes else None)
