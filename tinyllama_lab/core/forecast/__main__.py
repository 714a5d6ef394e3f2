"""Answers the `plan` command: reads packs as JSON from standard input, prints what they need.

With the argument `probe` it prints first, as a line of its own, what PyTorch can do here.

The imports are those of a worker, so that the resident memory of this process is what a worker
holds before it loads a base. They begin before the request comes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

from tinyllama_lab.core.resident import import_modules
from tinyllama_lab.errors import LabError
from tinyllama_lab.output import accept_any_text


def main() -> int:
    """Entry point; the exit status is that of the driver's commands."""
    accept_any_text("utf-8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    begin = time.monotonic()
    with answers:
        if "probe" in sys.argv[1:]:
            # of PyTorch alone: a fault of another package must not hide what PyTorch can do
            from tinyllama_lab.core.probe import probe

            probing = time.monotonic()
            print(json.dumps(probe()), file=answers, flush=True)
            begin += time.monotonic() - probing  # which a worker does not do
        import_modules("training.stream", "evaluation.bases", "forecast.answer")
        seconds = time.monotonic() - begin
        if text := sys.stdin.read():  # else the driver has refused the command
            print(json.dumps(_reply(text, seconds)), file=answers)
    return 0


def _reply(request: str, start_s: float) -> Mapping[str, Any]:
    from tinyllama_lab.core.forecast.answer import answer

    try:
        return {**answer(json.loads(request)), "start_s": start_s}
    except LabError as error:
        return {"problems": error.problems}


if __name__ == "__main__":
    try:
        status = main()
    except Exception:  # the driver shows its end
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    # to free memory object by object takes time, and some packages then warn of leaks
    os._exit(status)
