"""The Hydra app: `python -m tinyllama_lab`, or with `-m` a whole grid."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tinyllama_lab.errors import user_errors
from tinyllama_lab.sweep.check import check_command
from tinyllama_lab.sweep.compose import CONF_DIR, Cell, register_resolvers
from tinyllama_lab.sweep.run import all_ended_well, run_sweep


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def run_one(config: DictConfig) -> None:
    """Without `-m`: a sweep of one trial. With it, the launcher takes all of them at once."""
    job = HydraConfig.get()
    plain = OmegaConf.to_container(config, resolve=True)
    choices = dict(job.runtime.choices)
    cell = Cell(tuple(job.overrides.task), plain, choices)  # type: ignore[arg-type]
    launcher = str(choices["hydra/launcher"])
    with user_errors():
        results = run_sweep([cell], launcher, Path(job.runtime.cwd))
    if not all_ended_well(results):
        raise SystemExit(1)


def main() -> None:
    """Check what was typed, then let Hydra compose it."""
    with user_errors():
        check_command(sys.argv[1:])
    register_resolvers()
    run_one()


if __name__ == "__main__":
    main()
