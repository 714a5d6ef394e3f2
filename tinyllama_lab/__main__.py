"""The Hydra app: `python -m tinyllama_lab`, or with `-m` a whole grid.

The first word may also be another command: `data`, `ask`, `plan`, `doctor`, `evaluate`, `report`,
`track`, `ui` or `demo`; `--help` explains them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama_lab import __version__
from tinyllama_lab.errors import ConfigError, quiet_interrupt, user_errors

_BEGAN = time.monotonic()  # before imports that take a second of the time of `doctor`

with quiet_interrupt():  # importing these takes half a second, in which Ctrl-C may come
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf

    from tinyllama_lab.config import CONF_DIR
    from tinyllama_lab.output import accept_any_text
    from tinyllama_lab.sweep import guard
    from tinyllama_lab.sweep.check import check_command
    from tinyllama_lab.sweep.data_command import show_data
    from tinyllama_lab.sweep.evaluate_command import evaluate
    from tinyllama_lab.sweep.run import all_ended_well, run_grid
    from tinyllama_lab.sweep.settings.compose import (
        Cell,
        register_resolvers,
        use_folders_of,
        working_folder,
    )
    from tinyllama_lab.sweep.settings.flags import DRY_RUN, read_flags, with_folders
    from tinyllama_lab.sweep.settings.typed_paths import quote_paths
    from tinyllama_lab.sweep.ui_command import show_ui
    from tinyllama_lab.sweep.usage import help_text, without_grid

CONSOLE_SCRIPT = "tinyllama-lab"


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def run_one(config: DictConfig) -> None:
    """Run a sweep of one trial.

    With `-m`, Hydra calls the launcher instead, which runs all trials of the grid in one driver.
    """
    job = HydraConfig.get()
    plain = OmegaConf.to_container(config, resolve=True)
    choices = dict(job.runtime.choices)
    typed: Any = OmegaConf.to_container(job.overrides.task, resolve=False)
    cell = Cell(tuple(typed), plain, choices)  # type: ignore[arg-type]
    launcher = str(choices["hydra/launcher"])
    with user_errors():
        results = run_grid([cell], launcher, working_folder(job))
    if not all_ended_well(results):
        # 1: some trials failed; 2, of a `LabError`, means that nothing was started
        raise SystemExit(1)


def main() -> None:
    """Run the command in `sys.argv`; also the entry point of the console script."""
    accept_any_text()
    register_resolvers()
    guard.install()
    with user_errors():
        # first of all: every parser below would misread unquoted paths
        arguments = with_folders(quote_paths(sys.argv[1:]))
        use_folders_of(arguments)
        arguments = _sweep_arguments(arguments)
        check_command(arguments)
        # `hydra.main` reads the arguments from `sys.argv`
        sys.argv[1:] = _for_hydra(arguments)
        run_one()


def _sweep_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments of the sweep to run; run any other command and exit.

    Raises:
        SystemExit: the command was not a sweep; it has run to its end.
        ConfigError: the command cannot be planned.
    """
    is_dry = DRY_RUN in arguments
    arguments = [text for text in arguments if text != DRY_RUN]
    command, rest = "".join(arguments[:1]), arguments[1:]
    if command in _OTHERS:
        if is_dry:
            raise ConfigError(
                [f"{DRY_RUN} plans a sweep, got the command {command}; leave it out"]
            )
        raise SystemExit(_OTHERS[command](rest))
    if command == "demo":
        arguments = ["-m", "experiment=quickstart", *rest]
    elif command == "ask":
        from tinyllama_lab.sweep.ask.command import ask  # late: a second of imports

        if not (settings := ask(rest)):
            raise SystemExit(0)
        arguments = ["-m", *settings]
    if command == "plan" or is_dry:
        from tinyllama_lab.sweep.forecast.command import show_plan  # late, as above

        raise SystemExit(show_plan(rest if command == "plan" else arguments))
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(help_text())
        raise SystemExit(0)
    if "--version" in arguments:  # Hydra would print its own
        print(f"tinyllama_lab {__version__}")
        raise SystemExit(0)
    return arguments


def _report(arguments: list[str]) -> int:
    from tinyllama_lab.report.__main__ import main as report  # late: a second of imports

    report(arguments)
    return 0


def _doctor(arguments: list[str]) -> int:
    from tinyllama_lab.sweep.doctor.command import doctor  # late: no other command needs it

    return doctor(arguments, _BEGAN)


def _evaluate(arguments: list[str]) -> int:
    return evaluate(arguments, Path.cwd())


def _track(arguments: list[str]) -> int:
    from tinyllama_lab.sweep.track_command import track  # late, as above

    return track(arguments, Path.cwd())


_OTHERS: dict[str, Callable[[list[str]], int]] = {
    "data": show_data,
    "doctor": _doctor,
    "evaluate": _evaluate,
    "report": _report,
    "track": _track,
    "ui": show_ui,
}


def _for_hydra(arguments: list[str]) -> list[str]:
    """Return the arguments in the form that Hydra expects."""
    parsed = read_flags(arguments)
    if parsed.shell_completion and sys.argv[0].endswith(".py"):
        sys.argv[0] = CONSOLE_SCRIPT  # shells complete program names, not `python -m`
    return without_grid(arguments) if parsed.cfg or parsed.info else arguments


if __name__ == "__main__":
    main()
