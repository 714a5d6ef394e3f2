"""What an attack is, and how the tables of attacks are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tests.attacks.ground import TOUCHED, Ground

# Classes of attacks, as docs/security.md names them.
KINDS = {
    "S1": "objects made by settings",
    "S2": "code through Hydra's own node",
    "S3": "secrets read by settings",
    "S4": "paths that leave their root",
    "S5": "shells and clusters",
    "S6": "pickles",
    "S7": "code of a model",
    "S8": "expressions that never end",
    "S9": "damaged weights",
    "S10": "chat templates",
    "S11": "YAML",
    "S12": "markup and escapes in what is shown",
    "S13": "servers",
    "S14": "requests of other sites",
    "S15": "Ray",
    "S16": "databases",
    "S17": "other users of the machine",
    "S18": "rows that pose as something else",
    "S19": "results that were changed",
    "S20": "network at run time",
    "S21": "telemetry",
    "S22": "forbidden calls in the code",
}
# Python that an attacker wants to run; Hydra's own list of forbidden targets lets it pass
COPY = f"{{_target_: shutil.copyfile, src: rows.jsonl, dst: {TOUCHED}}}"
TYPED_COPY = COPY.replace(": ", ":").replace(", ", ",")


@dataclass(frozen=True)
class Attack:
    """An attack; `run` tries it, and fails unless it is refused or harmless."""

    id: str
    kind: str
    what: str
    run: Callable[[Ground], None]


Typed = tuple[str, str, tuple[str, ...], str]  # id, what, settings, part of the answer
Files = tuple[str, str, dict[str, str], tuple[str, ...], str]


def typed(kind: str, table: Sequence[Typed]) -> list[Attack]:
    """Return attacks by settings that are typed; each is refused before anything happens."""

    def run(settings: Sequence[str], says: str, ground: Ground) -> None:
        ground.sweep_refused(*settings, says=says)

    return [Attack(n, kind, what, partial(run, argv, says)) for n, what, argv, says in table]


def folders(kind: str, table: Sequence[Files]) -> list[Attack]:
    """Return attacks by a folder of settings that somebody else wrote."""

    def run(files: dict[str, str], settings: Sequence[str], says: str, ground: Ground) -> None:
        ground.folder_refused(files, *settings, says=says)

    return [
        Attack(n, kind, what, partial(run, files, argv, says))
        for n, what, files, argv, says in table
    ]
