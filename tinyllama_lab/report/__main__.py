"""`python -m tinyllama_lab report study=<name>`: prints and writes the report of a study.

`python -m tinyllama_lab report claims` compares published numbers with the studies that are here.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict

from tinyllama_lab.errors import ConfigError, StudyError, quiet_interrupt, user_errors

with quiet_interrupt():  # importing these takes most of a second, in which Ctrl-C may come
    from rich.console import Console

    from tinyllama_lab.config.command import STUDY, SWEEPS_DIR, unquoted
    from tinyllama_lab.metrics import COSTS
    from tinyllama_lab.output import accept_any_text, line_width
    from tinyllama_lab.report.analysis.analysis import Analysis
    from tinyllama_lab.report.analysis.settings import DEFAULTS, PAIRS, Settings, margin_problem
    from tinyllama_lab.report.analysis.statistics import METHODS
    from tinyllama_lab.report.analysis.trial_rows import read_study
    from tinyllama_lab.report.claims import print_claims
    from tinyllama_lab.report.failures import failures
    from tinyllama_lab.report.findings import print_findings
    from tinyllama_lab.report.page.page import not_default, write_report
    from tinyllama_lab.report.table import print_confirmation, print_table, write_table
    from tinyllama_lab.study.files import exists, user_path, utf8_problem
    from tinyllama_lab.study.study import StudyFolder

_DEFAULTS = {"study": STUDY, "sweeps_dir": SWEEPS_DIR} | {
    name: str(value) for name, value in asdict(DEFAULTS).items()
}
_USAGE = (
    "a report takes study=<name>, sweeps_dir=<folder>, margin=<nats>, "
    f"cost={'|'.join(COSTS)}, correction={'|'.join(METHODS)} and pairs={'|'.join(PAIRS)}, "
    "or the word claims"
)
_WORDS = {
    "study": "the study to report on",
    "sweeps_dir": "where studies are kept",
    "margin": "the difference in loss that matters, in nats per token",
    "cost": f"what a recommendation saves: {', '.join(COSTS)}",
    "correction": f"of p values, for many comparisons: {', '.join(METHODS)}",
    "pairs": f"values of a setting to compare: {', '.join(PAIRS)}",
}
_LISTED = "\n".join(
    f"  {f'{name}={_DEFAULTS[name]}':<20}{words}" for name, words in _WORDS.items()
)
_HELP = f"""\
python -m tinyllama_lab report study=ranks    (or: tinyllama-lab report ...)

Prints the table of a study and what it shows, and writes the page report/index.html. The settings
and their defaults:

{_LISTED}

python -m tinyllama_lab report claims compares the published numbers of the reference projects
with the studies that are here."""


def main(arguments: list[str]) -> None:
    """Print the table and the findings of a study, and write its page.

    Args:
        arguments: the command line without the name of the program.

    Raises:
        ConfigError: an argument is unknown, or its value is out of bounds.
        StudyError: there is no such study, or one of its files is damaged.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(_HELP)
        return
    wants_claims = arguments[:1] == ["claims"]
    options = _options(arguments[1:] if wants_claims else arguments)
    console = Console(width=line_width())
    root = user_path(options["sweeps_dir"])
    if wants_claims:
        print_claims(root, console)
        return
    settings = _settings(options)
    study = StudyFolder(root, options["study"])
    rows = read_study(study)
    if not rows.trials:
        raise study.no_trials_error()
    # a report that skips damaged trials would be incomplete without saying so
    if problem := next(study.problems(), None):
        raise StudyError(f"{problem}; move it away, or copy the study and set sweeps_dir=<copy>")
    analysis = Analysis(rows, settings)
    write_table(study, rows)
    print_table(rows.trials, console, study)
    print_confirmation(rows.confirmation, console, study)
    # not wrapped, so that a command or a path can be copied as one line
    for text in failures([*rows.trials, *rows.confirmation]):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    print_findings(study, analysis, console)
    page = write_report(study, analysis)
    print(f"written: {page}, {study.table_file} and {study.metrics_file}")
    if changed := not_default(study, settings):
        print(f"note: {changed}")


def _options(arguments: list[str]) -> dict[str, str]:
    """Return the defaults of `_DEFAULTS`, replaced by what was typed.

    Raises:
        ConfigError: an argument is unknown.
    """
    options = dict(_DEFAULTS)
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if name not in options or not sign:
            raise ConfigError([f"{_USAGE}, got {argument!r}"])
        options[name] = value
    folder = options["sweeps_dir"]
    if problem := utf8_problem(folder):
        raise ConfigError([problem])
    if not exists(folder):  # maybe in quotes, as Hydra's grammar allows in a sweep
        options["sweeps_dir"] = unquoted(folder)
    return options


def _settings(options: dict[str, str]) -> Settings:
    try:
        margin = float(options["margin"])
    except ValueError:
        raise ConfigError([margin_problem(math.nan, options["margin"])]) from None
    settings = Settings(margin, options["cost"], options["correction"], options["pairs"])
    if problems := settings.problems():
        raise ConfigError(problems)
    return settings


if __name__ == "__main__":
    accept_any_text()
    with user_errors():
        main(sys.argv[1:])
