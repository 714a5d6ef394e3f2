"""A process that has imported the command, and runs each command line in a fork of itself.

It reads JSON lines from standard input: `argv`, `folder` and `environment`. It answers each with
the exit status of the command, whose output goes into files. Starting Python for each of a hundred
command lines would take minutes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

MOST_SECONDS = 20


def run(request: dict[str, Any]) -> int:
    """Run a command in a fork, and return its exit status; -9 if it took too long."""
    child = os.fork()
    if child == 0:
        _command(request)
    begun = time.monotonic()
    while time.monotonic() - begun < MOST_SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9


def _command(request: dict[str, Any]) -> None:
    """Become the command; never return."""
    from tinyllama_lab.__main__ import main

    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    files = (os.devnull, request["out"], request["err"])
    for number, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = ["tinyllama_lab", *request["argv"]]
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    from tinyllama_lab.sweep.check import check_command  # before the first request

    check_command(["-m", "lora.r=2"])

    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
