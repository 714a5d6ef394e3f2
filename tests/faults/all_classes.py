"""The classes of faults, in the order of the page."""

from __future__ import annotations

from tests.faults.damage import DAMAGE
from tests.faults.fault import FaultClass
from tests.faults.finished import FINISHED
from tests.faults.fuzz import FUZZ
from tests.faults.kills import KILLED
from tests.faults.memory import MEMORY
from tests.faults.outages import OUTAGES
from tests.faults.real_kills import REAL
from tests.faults.steps import CRASHED_AT, FAILED_AT
from tests.faults.tried_attacks import ATTACKED
from tests.faults.worker_steps import WORKER

CLASSES: tuple[FaultClass, ...] = (
    *(KILLED, REAL, CRASHED_AT, WORKER, DAMAGE, FAILED_AT, OUTAGES, FUZZ, ATTACKED, MEMORY),
    FINISHED,
)
