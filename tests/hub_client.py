"""Asks a hub for models and data sets from processes with an environment of their own.

The client reads `HF_ENDPOINT` and `HF_HOME` when it is imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.hub_server import hub_environment

_SCRIPT = """
import errno, json, os, sys
from pathlib import Path
from huggingface_hub.utils import close_session
from tinyllama_lab.data import hub, hub_requests
from tinyllama_lab.errors import LabError

real_open = Path.open

class Full:
    '''A file on a full disk.'''
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, content): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def open_full(path, *arguments, **options):
    file = real_open(path, *arguments, **options)
    is_written = path.name.endswith(".incomplete") and {"w", "a"} & set(str(arguments))
    return Full(file) if is_written else file

def ask(kind, repo, revision, variables={}):
    os.environ.update(variables)
    close_session()  # a new one reads the environment again
    Path.open = open_full if os.environ.get("DISK") == "full" else real_open
    if os.environ.get("DISK") == "small":
        hub.free_mib = lambda folder: 0
    try:
        return str(hub.download(repo, hub.resolve(repo, revision, kind), kind))
    except LabError as error:
        return [type(error).__name__, str(error)]

hub_requests.WAITS_S = (0.1, 0.1)
for line in sys.stdin:
    print(json.dumps([ask(*repository) for repository in json.loads(line)]), flush=True)
"""
Outcome = str | list[str]  # the folder of a snapshot, or the class and message of an error


class Client:
    """`client(("model", "o/m", None), HF_TOKEN="x")` resolves and downloads.

    There is one process for each set of variables. A repository may end in variables of its own,
    which stay set for those after it.
    """

    def __init__(self, home: Path, endpoint: str) -> None:
        self._home, self._endpoint = home, endpoint
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __call__(self, *repositories: tuple[Any, ...], **variables: str) -> list[Outcome]:
        """Return the outcome for each repository."""
        key = str(variables)
        if key not in self._processes:
            settings = {"endpoint": self._endpoint, **variables}
            self._processes[key] = subprocess.Popen(
                [sys.executable, "-c", _SCRIPT],
                env=hub_environment(self._home, **settings),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        to, answers = self._processes[key].stdin, self._processes[key].stdout
        assert to is not None and answers is not None
        print(json.dumps(repositories), file=to, flush=True)
        return json.loads(answers.readline())  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the processes; none may have printed a traceback."""
        for process in self._processes.values():
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0 and "Traceback" not in errors, errors


@contextmanager
def hub_client(home: Path, endpoint: str) -> Iterator[Client]:
    """Ask from a machine with the cache below `home`, until the block ends."""
    client = Client(home, endpoint)
    try:
        yield client
    finally:
        client.close()
