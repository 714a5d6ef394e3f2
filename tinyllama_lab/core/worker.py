"""The worker process: `python -m tinyllama_lab.core.worker PACK_FOLDER`.

Without the argument it imports what it needs, and waits for the folder on its standard input.

It reads `pack.json`, loads the base once, and trains the pack's adapters together. The adapters of
trials that are done are loaded, to be scored again. It writes everything into the trial folders
and the pack's own event file, where the driver reads it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_lab.config.schema import HardwareConfig, ModelConfig, QuantConfig, part
from tinyllama_lab.core.resident import import_modules, keep_freed_memory, limit_kernels
from tinyllama_lab.errors import BaseMemoryError, LabError, StoppedError, is_disk_full
from tinyllama_lab.output import accept_any_text
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.machine import share_cores
from tinyllama_lab.study.pack import DRIVER_PID, Arrivals, Exit, Pack, Task

if TYPE_CHECKING:  # imports torch, so later: the driver first sees that the worker runs
    from tinyllama_lab.core.context import WorkerContext
    from tinyllama_lab.core.dataset.dataset import DataCache

logger = logging.getLogger(__name__)
BEAT_EVERY_S = 1.0
ASKED_BEFORE_TRAINING = 1  # times that a worker looks for a signal before it trains
IDLE_S = 1e-3  # of computing in that time, of which this thread alone needs a tenth


def run_pack(folder: Path, stopped: Callable[[], bool]) -> Exit:
    """Run every trial of a pack that has no result yet."""
    pack = Pack(folder)
    with pack.locked():
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
    """Load the base and the data that the trials share, then train and score the trials."""
    work = pack.read()
    if work.gpu is not None:
        # before torch is imported, because CUDA reads it only once
        os.environ["CUDA_VISIBLE_DEVICES"] = work.gpu
    log.append("phase", name="starting")
    # slow imports: only after the pack is locked and the driver sees that the worker runs
    import torch

    from tinyllama_lab.core.context import WorkerContext, raise_if_stopped
    from tinyllama_lab.core.meter import PeakMemory
    from tinyllama_lab.core.models.loading import load_base
    from tinyllama_lab.core.training.tasks import tasks_with_data

    raise_if_stopped(stopped)  # the driver may have died during the imports
    hardware = part(HardwareConfig, work.hardware)
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    model, quant = part(ModelConfig, work.base.model), part(QuantConfig, work.base.quant)
    arrivals = pack.arrivals()
    tasks = [task for task in (*work.tasks, *arrivals.poll()) if task.read_result() is None]
    with _base_errors():
        data = _data_cache(model, log)
        tasks = tasks_with_data(data, tasks)
        if not tasks and arrivals.closed:
            return
        kernels = limit_kernels(len(tasks))
        log.append("phase", name="loading the base")
        base = load_base(model, quant, work.base.precision, hardware.device, data.tokenizer)
    # not earlier, because what loading frees should go back to the system
    keep_freed_memory()
    memory = PeakMemory(base.device)
    context = WorkerContext(base, data, hardware, memory, work.profile, stopped, work.stream)
    context.kernels = kernels
    trains = not arrivals.closed or any(task.result_folder == task.trial for task in tasks)
    log.append("phase", name="training" if trains else "scoring")
    _train(context, arrivals, tasks, work.base.deterministic)


def _data_cache(model: ModelConfig, log: EventLog) -> DataCache:
    """Return an empty cache of data sets for a base, which is downloaded if it is not here."""
    from tinyllama_lab.core.dataset.dataset import DataCache
    from tinyllama_lab.core.models.loading import model_folder, read_tokenizer, repo_to_download

    if repo := repo_to_download(model):
        log.append("phase", name=f"downloading {repo}")
        model_folder(model)
    log.append("phase", name="reading the data")
    return DataCache(*read_tokenizer(model))


def _train(
    context: WorkerContext, arrivals: Arrivals, tasks: list[Task], deterministic: bool
) -> None:
    """Train and score the tasks, and those that arrive meanwhile."""
    import torch

    from tinyllama_lab.core.evaluation.bases import Bases
    from tinyllama_lab.core.training.stream import TrialStream, run_stream

    torch.use_deterministic_algorithms(deterministic)
    try:
        stream = TrialStream(context, arrivals, tasks)
        run_stream(context, Bases(context), stream, deterministic)
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _base_errors() -> Iterator[None]:
    """Turn an unexpected error in the block into a BaseError.

    Raises:
        BaseError: the base could not be loaded; it contains the reason.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, LabError) or is_disk_full(error):
            raise
        from tinyllama_lab.core.out_of_memory import base_error

        logger.exception("the base could not be loaded")
        raise base_error(error, "loaded") from error


def _end_with_driver() -> None:
    """Ask Linux for a SIGTERM when the driver dies, so that no worker is left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
    driver = os.environ.get(DRIVER_PID)
    if driver is not None and os.getppid() != int(driver):
        sys.exit(int(Exit.STOPPED))  # the driver died before prctl was called


class StopFlag:
    """Whether SIGTERM or SIGINT was received; `asked` counts how often that was looked for."""

    def __init__(self) -> None:
        self.asked = 0
        self._came = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def __call__(self) -> bool:
        self.asked += 1
        return self._came

    def _receive(self, number: int, frame: Any) -> None:
        self._came = True


def _beat(pack: Pack, stopped: StopFlag) -> None:
    """Write a heartbeat every second in which the worker computed, or looked for a signal.

    It does neither while it is stopped, waits for a lock for ever, or for a broken disk. Until it
    trains it may also wait for a hub, which is no reason to replace it.
    """
    computed_s, asked = 0.0, -1
    while True:
        is_loading = stopped.asked <= ASKED_BEFORE_TRAINING
        is_busy = time.process_time() - computed_s > IDLE_S or stopped.asked != asked
        if is_loading or is_busy:
            computed_s, asked = time.process_time(), stopped.asked
            with contextlib.suppress(OSError):  # a beat that is lost is silence
                pack.beat()
        time.sleep(BEAT_EVERY_S)


def _wait_for_pack() -> Path:
    """Import what a pack needs, and return the folder that the driver then sends.

    What was printed until then moves to the log of the pack, as everything after it does.
    """
    try:
        import_modules("training.stream", "evaluation.bases")
    except Exception:  # the pack fails too, and its log has this reason
        logger.exception("the imports failed")
    line = sys.stdin.readline()
    if not line:  # the driver has ended, or needs no worker
        sys.exit(int(Exit.STOPPED))
    pack = Pack(Path(json.loads(line)))
    with pack.log_file.open("ab") as log, open(1, "r+b", closefd=False) as printed:
        printed.seek(0)
        log.write(printed.read())
        log.flush()
        printed.truncate(0)
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    return pack.folder


def main() -> int:
    """Entry point; the exit status is one of `Exit`."""
    accept_any_text("utf-8")  # it goes into a log, which is read as such
    _end_with_driver()
    # tokenizers that have used threads warn whenever the process forks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for train.deterministic
    share_cores()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(True)
    stopped = StopFlag()
    try:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else _wait_for_pack()
    except OSError as error:
        if not is_disk_full(error):
            raise
        return int(Exit.NO_SPACE)
    threading.Thread(target=_beat, args=(Pack(folder), stopped), daemon=True).start()
    return int(run_pack(folder, stopped))


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError):  # the disk may be full
        sys.stdout.flush()
        logging.shutdown()
    # everything is on disk, and to free gigabytes object by object takes seconds
    os._exit(status)
