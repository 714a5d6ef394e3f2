"""Answers the `plan` command: reads packs as JSON from standard input, prints what they need.

The imports are those of a worker, so that the resident memory of this process is what a worker
holds before it loads a base. They begin before the request comes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from tinyllama_lab.errors import LabError
from tinyllama_lab.output import accept_any_text


def main() -> int:
    """Entry point; the exit status is that of the driver's commands."""
    accept_any_text("utf-8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    answer_file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answer
    begin = time.monotonic()
    for name in ("training.stream", "evaluation.bases", "forecast.answer"):
        importlib.import_module(f"tinyllama_lab.core.{name}")
    seconds = time.monotonic() - begin
    from tinyllama_lab.core.forecast.answer import answer

    text = sys.stdin.read()
    if not text:  # the driver has refused the command
        return 0
    try:
        reply: Mapping[str, Any] = {**answer(json.loads(text)), "start_s": seconds}
    except LabError as error:
        reply = {"problems": error.problems}
    with answer_file:
        json.dump(reply, answer_file)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # to free memory object by object would take time
