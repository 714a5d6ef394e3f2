"""The Hydra app: `python -m tinyllama_lab`, or with `-m` a whole grid.

`python -m tinyllama_lab data ...` shows what such a command would train on, and
`python -m tinyllama_lab ask ...` what a question needs and costs;
`python -m tinyllama_lab evaluate study=...` scores the trials of a study once more.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.errors import user_errors
from tinyllama_lab.output import accept_any_text
from tinyllama_lab.sweep.check import check_command
from tinyllama_lab.sweep.data_command import show_data
from tinyllama_lab.sweep.evaluate_command import evaluate
from tinyllama_lab.sweep.run import all_ended_well, run_sweep
from tinyllama_lab.sweep.settings.compose import Cell, register_resolvers, working_folder
from tinyllama_lab.sweep.settings.typed_paths import quote_paths


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def run_one(config: DictConfig) -> None:
    """Without `-m`: a sweep of one trial. With it, the launcher takes all of them at once."""
    job = HydraConfig.get()
    plain = OmegaConf.to_container(config, resolve=True)
    choices = dict(job.runtime.choices)
    typed: Any = OmegaConf.to_container(job.overrides.task, resolve=False)
    cell = Cell(tuple(typed), plain, choices)  # type: ignore[arg-type]
    launcher = str(choices["hydra/launcher"])
    with user_errors():
        results = run_sweep([cell], launcher, working_folder(job))
    if not all_ended_well(results):
        raise SystemExit(1)


def main() -> None:
    """Check what was typed, then let Hydra compose it."""
    accept_any_text()
    sys.argv[1:] = quote_paths(sys.argv[1:])
    with user_errors():
        if sys.argv[1:2] == ["data"]:
            raise SystemExit(show_data(sys.argv[2:]))
        if sys.argv[1:2] == ["ask"]:
            from tinyllama_lab.sweep.ask.command import ask  # late: a second of imports

            if not (settings := ask(sys.argv[2:])):
                raise SystemExit(0)
            sys.argv[1:] = ["-m", *settings]
        if sys.argv[1:2] == ["evaluate"]:
            raise SystemExit(evaluate(sys.argv[2:], Path.cwd()))
        check_command(sys.argv[1:])
    register_resolvers()
    run_one()


if __name__ == "__main__":
    main()
