"""`python -m tinyllama_lab ask ...`: prints what a question needs, and proposes a command.

The proposed command has enough seeds and held-out rows to decide the question.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from tinyllama_lab.config.command import sweep_command
from tinyllama_lab.errors import LabError
from tinyllama_lab.output import line_width
from tinyllama_lab.report.analysis.settings import MARGIN
from tinyllama_lab.report.analysis.statistics import POWER
from tinyllama_lab.sweep.ask.answer import Answer
from tinyllama_lab.sweep.ask.question import POWERS, RUN, USAGE, AskRequest

HELP = f"""\
{USAGE}

Says before anything is trained how many seeds and held-out rows a question needs, and what that
costs. Takes the settings of a grid, lists included, and settings of its own:

  margin={MARGIN:g}  the difference that matters, in nats per token
  power={POWER:g}    the chance to show it, from {POWERS[0]} to {POWERS[1]}
  run={RUN[0]}      whether to run the proposed command: {", ".join(RUN)} (ask: on a terminal)"""


def ask(words: Sequence[str]) -> list[str]:
    """Print what a question needs, and return the settings of the sweep to run now, if any.

    Raises:
        LabError: the command is wrong, or `run=true` and no command can be proposed.
    """
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return []
    request = AskRequest.read(words)
    answer = Answer(request)
    console = Console(width=line_width(), highlight=False)
    for name, text in answer.lines():
        console.print(Text.assemble((f"{name:<13}", "bold"), text), soft_wrap=True)
    settings = answer.command()
    if not settings:
        if request.run == "true":
            raise LabError(
                "nothing was run: no command can decide this question, see the lines above"
            )
        return []
    console.print(Text(sweep_command(["-m", *settings])), soft_wrap=True)
    return settings if _is_to_run(request.run) else []


def _is_to_run(run: str) -> bool:
    if run != "ask":
        return run == "true"
    # in a pipe or a script nobody can answer
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return input("run this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
