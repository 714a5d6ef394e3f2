"""The peak memory of a process and its children, read from outside so that no arm is slowed."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

EVERY_S = 0.1


class PeakWatcher:
    """Samples the high-water mark (VmHWM) of a running process and of all processes below it.

    A worker of this project resets its mark between trials, so the last value is not the peak.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._root = process.pid
        self._seen: set[int] = set()
        self._peaks: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def peak_mib(self) -> float | None:
        """The sum of the peaks of all processes; None if the system does not report them."""
        return sum(self._peaks.values()) or None

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            for pid in _tree(self._root):
                value = _high_water_mib(pid)
                # between fork and exec a child shows its parent's mark: skip the first look
                if value is not None and pid in self._seen:
                    self._peaks[pid] = max(value, self._peaks.get(pid, 0.0))
                self._seen.add(pid)


def _tree(root: int) -> list[int]:
    pids, todo = [], [root]
    while todo:
        pid = todo.pop()
        pids.append(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has ended, or this is not Linux
    return pids


def _high_water_mib(pid: int) -> float | None:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass  # it has ended
    return None
