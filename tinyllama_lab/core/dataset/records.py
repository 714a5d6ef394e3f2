"""The records of a data set, from the hub or from this machine.

This is the boundary between the worker and `tinyllama_lab.data`, which the driver uses too.
Rows of the hub are read here, because that needs the library `datasets`, which the driver must
not import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data import hub
from tinyllama_lab.data.reading.readers import arrow_records
from tinyllama_lab.data.sources import content_digest, load_held_out, load_rows
from tinyllama_lab.data.splits.local_split import load_split
from tinyllama_lab.data.splits.splits import Split, split_records
from tinyllama_lab.errors import DataChangedError, DataError


def read_split(data: DataConfig) -> Split:
    """Read all rows and split them.

    Raises:
        DataError: the rows cannot be read, or differ from those that the trial's key identifies.
    """
    if data.kind.is_remote:
        folder = hub.download(str(data.repo), str(data.identity), "dataset")
        held_out = hub_records(data, folder, "eval_split") if data.eval_split else None
        return split_records(hub_records(data, folder), data, held_out)
    _check_identity(data)
    split = load_split(data, load_rows, load_held_out)
    _check_identity(data)  # the file may have changed while it was read
    return split


def _check_identity(data: DataConfig) -> None:
    """Refuse data whose content differs from what the trial's key identifies."""
    if data.identity is not None and content_digest(data) != data.identity:
        raise DataChangedError(
            f"data={data.name} must stay as it was when the sweep was planned, but its file "
            "changed; run the same command again"
        )


def hub_records(data: DataConfig, folder: Path, setting: str = "split") -> list[dict[str, Any]]:
    """Return the records of the split `data.<setting>` of a data set downloaded to `folder`."""
    import datasets  # late: seconds of import that local files do not need

    split = getattr(data, setting) or "train"
    try:
        dataset = datasets.load_dataset(str(folder), name=data.config, split=split)
    except (ValueError, FileNotFoundError) as error:
        raise DataError(
            f"data.config and data.{setting} must name parts of {data.repo}, got {data.config} "
            f"and {split} ({' '.join(str(error).split())[:200]}); set data.config or "
            f"data.{setting}"
        ) from error
    return arrow_records(dataset.with_format("arrow")[:])
