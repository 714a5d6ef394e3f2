"""The worker process: `python -m tinyllama_lab.core.worker PACK_FOLDER`.

It reads `pack.json`, loads the base once, and runs the pack's trials one after the other. All
it has to say goes into the trial folders and the pack's own event file; the driver reads there.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_lab.config import HardwareConfig, Science, part
from tinyllama_lab.errors import BaseError, LabError, StoppedError, is_disk_full
from tinyllama_lab.events import EventLog
from tinyllama_lab.pack import DRIVER_PID, Exit, Pack, Task
from tinyllama_lab.trial import Result, Trial

if TYPE_CHECKING:
    from tinyllama_lab.core.bases import Bases
    from tinyllama_lab.core.bench import Bench

logger = logging.getLogger(__name__)


def run_pack(folder: Path, stopped: Callable[[], bool]) -> Exit:
    """Run every trial of a pack that has no result yet."""
    pack = Pack(folder)
    with pack.held():
        log = EventLog(pack.events_file)
        try:
            _run_trials(pack, log, stopped)
        except StoppedError:
            return Exit.STOPPED
        except LabError as error:
            log.append("error", message=str(error))
            return Exit.NO_BASE
        except Exception as error:
            if not is_disk_full(error):
                raise
            logger.error("no space left on the disk while writing below %s", folder)
            return Exit.NO_SPACE
    return Exit.DONE


def _run_trials(pack: Pack, log: EventLog, stopped: Callable[[], bool]) -> None:
    work = pack.read()
    log.append("phase", name="starting")
    # the heavy half: imported after the pack is held and the driver sees that we live
    import torch

    from tinyllama_lab.core.bases import Bases
    from tinyllama_lab.core.bench import Bench
    from tinyllama_lab.core.data import DataCache
    from tinyllama_lab.core.meter import PeakMemory
    from tinyllama_lab.core.model import load_base

    hardware = part(HardwareConfig, work.hardware)
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    science = part(Science, work.tasks[0].trial.read_config())
    log.append("phase", name="loading the base")
    try:
        base = load_base(science.model, science.quant, science.train.precision, hardware)
    except Exception as error:
        if isinstance(error, LabError) or is_disk_full(error):
            raise
        logger.exception("the base could not be loaded")
        raise BaseError(f"the base could not be loaded: {error}") from error
    memory = PeakMemory(base.device)
    bench = Bench(base, DataCache(base.tokenizer), hardware, memory, work.profile, stopped)
    bases = Bases(bench)
    for task in work.tasks:
        if stopped():
            raise StoppedError("asked to stop")
        if task.trial.read_result()[0] is None:
            with _logging_to(task.trial):
                _say(_run(bench, bases, task, log))


def _run(bench: Bench, bases: Bases, task: Task, log: EventLog) -> Result:
    from tinyllama_lab.core.trials import fail_trial, run_trial

    science = part(Science, task.trial.read_config())
    if task.base.read_result()[0] is None:
        log.append("phase", name="base")
    try:
        base_result = bases.result_of(task.base, science)
    except BaseError as error:
        return fail_trial(bench, task.trial, list(task.overrides), error)
    log.append("phase", name=task.trial.name)
    return run_trial(bench, task.trial, list(task.overrides), base_result)


def _say(result: Result) -> None:
    logger.info("%s: %s %s", result.name, result.state, result.error or "")


@contextlib.contextmanager
def _logging_to(trial: Trial) -> Iterator[None]:
    """Send the log, warnings included, to the trial's own file as well."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(trial.log_file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _end_with_driver() -> None:
    """Ask Linux for a SIGTERM when the driver dies, so that no worker is left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
    driver = os.environ.get(DRIVER_PID)
    if driver is not None and os.getppid() != int(driver):
        sys.exit(int(Exit.STOPPED))  # it died before it could be watched


def _stop_flag() -> Callable[[], bool]:
    """A function that says whether SIGTERM or SIGINT has come."""
    came: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: came.append(received))
    return lambda: bool(came)


def main() -> int:
    """Entry point; the exit status is one of `Exit`."""
    _end_with_driver()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for train.deterministic
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(True)
    return int(run_pack(Path(sys.argv[1]), _stop_flag()))


if __name__ == "__main__":
    sys.exit(main())
