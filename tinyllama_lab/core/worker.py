"""The worker process: `python -m tinyllama_lab.core.worker PACK_FOLDER`.

It reads `pack.json`, loads the base once, and trains the pack's adapters together; those of
trials that are done are loaded, to be scored again. All it has
to say goes into the trial folders and the pack's own event file; the driver reads there.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tinyllama_lab.config.schema import HardwareConfig, Science, part
from tinyllama_lab.errors import BaseMemoryError, LabError, StoppedError, is_disk_full
from tinyllama_lab.output import accept_any_text
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.pack import DRIVER_PID, Exit, Pack, Work

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
            is_memory = isinstance(error, BaseMemoryError)
            log.append("error", message=str(error), out_of_memory=is_memory)
            return Exit.NO_BASE
        except Exception as error:
            if not is_disk_full(error):
                raise
            logger.error("no space left on the disk while writing below %s", folder)
            return Exit.NO_SPACE
    return Exit.DONE


def _run_trials(pack: Pack, log: EventLog, stopped: Callable[[], bool]) -> None:
    work = pack.read()
    if work.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = work.gpu
    log.append("phase", name="starting")
    # the heavy half: imported after the pack is held and the driver sees that we live
    import torch

    from tinyllama_lab.core.context import WorkerContext
    from tinyllama_lab.core.dataset.dataset import DataCache
    from tinyllama_lab.core.evaluation.bases import Bases
    from tinyllama_lab.core.meter import PeakMemory
    from tinyllama_lab.core.models.loading import load_base, read_tokenizer
    from tinyllama_lab.core.out_of_memory import base_error
    from tinyllama_lab.core.training.attempt import take_up, with_data
    from tinyllama_lab.core.training.memory import keep_freed_memory
    from tinyllama_lab.core.training.pool import Pool
    from tinyllama_lab.core.training.select import engines
    from tinyllama_lab.core.training.stream import TrialStream, run_stream

    hardware = part(HardwareConfig, work.hardware)
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    science = _shared_science(work)
    missing = [task for task in work.tasks if task.read_result() is None]
    try:
        log.append("phase", name="reading the data")
        data = DataCache(*read_tokenizer(science.model))
        if work.stream is None:
            missing = with_data(data, missing)
            if not missing:
                return
        log.append("phase", name="loading the base")
        precision = science.train.precision
        base = load_base(science.model, science.quant, precision, hardware.device, data.tokenizer)
    except Exception as error:
        if isinstance(error, LabError) or is_disk_full(error):
            raise
        logger.exception("the base could not be loaded")
        raise base_error(error, "loaded") from error
    keep_freed_memory()
    memory = PeakMemory(base.device)
    context = WorkerContext(base, data, hardware, memory, work.profile, stopped, work.stream)
    trains = work.stream is not None or any(task.place_of_result == task.trial for task in missing)
    log.append("phase", name="training" if trains else "scoring")
    bases = Bases(context)
    deterministic = science.train.deterministic
    torch.use_deterministic_algorithms(deterministic)
    try:
        if work.stream is not None:
            run_stream(
                context, bases, TrialStream(context, pack.arrivals(), work.tasks), deterministic
            )
            return
        attempts = take_up(context, missing)
        for engine, own in engines(base, attempts, hardware.keep_dequantized):
            Pool(context, engine, bases).run(own)
    finally:
        torch.use_deterministic_algorithms(False)


def _shared_science(work: Work) -> Science:
    """The configuration of the first trial that has a readable one; a pack shares its base."""
    for task in work.tasks[:-1]:
        with contextlib.suppress(LabError):
            return part(Science, task.trial.read_config())
    return part(Science, work.tasks[-1].trial.read_config())


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
    accept_any_text("utf-8")  # it goes into a log, which is read as such
    _end_with_driver()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for train.deterministic
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(True)
    return int(run_pack(Path(sys.argv[1]), _stop_flag()))


if __name__ == "__main__":
    sys.exit(main())
