"""The text of `--help`, and the command that `--cfg` shows for a grid."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from tinyllama_lab.sweep.check import single_values
from tinyllama_lab.sweep.settings.compose import groups
from tinyllama_lab.sweep.settings.flags import MULTIRUN, read_flags

_HEAD = """\
tinyllama_lab runs sweeps of LoRA and QLoRA fine-tunes of a small language model,
compares them, and says which settings were worth it.

  python -m tinyllama_lab [-m] [key=value ...]    (or: tinyllama-lab [-m] ...)

Six examples:
  run a sweep    python -m tinyllama_lab -m lora.r=8,16 data.n=64,128 study=ranks
  report         python -m tinyllama_lab report study=ranks
  ask            python -m tinyllama_lab ask lora.r=8,16 margin=0.02
  plan           python -m tinyllama_lab plan -m lora.r=8,16 hardware=t4
  data           python -m tinyllama_lab data data=file data.path=my.jsonl
  evaluate       python -m tinyllama_lab evaluate study=ranks eval.generations=300

The sweep trains every combination of the values; without -m it trains one. `ask` says what a
question costs before anything is trained, `plan` whether a sweep fits this machine or a card,
`data` shows what would be trained on, and `evaluate` scores trained adapters again. Each of them
explains itself with --help. `demo` runs a small sweep, `ui` opens the runs in MLflow, `track`
sends it what it lacks, and `doctor` checks this machine. `python -m tinyllama_lab.deploy` uses a
trained adapter.
"""
_TAIL = """
Options:
  -m                    several values of a setting, with commas between them, are a grid
  --dry-run             print what `plan` prints, and run nothing
  --cfg job             show every setting and its value, and run nothing; also with -m
  --config-dir <folder> your own files, such as <folder>/data/mine.yaml for data=mine
  -sc install=bash      tab completion: eval "$(tinyllama-lab -sc install=bash)"
  --version             print the version of tinyllama_lab
  --hydra-help          options of Hydra, which reads the command line
"""


def help_text() -> str:
    """Return the text that `--help` prints."""
    options = [
        textwrap.fill(f"  {group:<12}{', '.join(names)}", 80, subsequent_indent=" " * 14)
        for group, names in groups().items()
        if len(names) > 1
    ]
    title = "Groups of settings, chosen as in data=dolly:"
    return "\n".join([_HEAD, title, *options, _TAIL]).rstrip()


def without_grid(arguments: Sequence[str]) -> list[str]:
    """Return the command with the first value of each setting, for `--cfg` and `--info`.

    Hydra shows one configuration only. The settings of the grid are printed first, as a comment
    of the YAML that follows.
    """
    flags = [text for text in arguments if text in MULTIRUN]
    typed = read_flags(arguments).overrides
    if not flags and "hydra.mode=MULTIRUN" not in typed:
        return list(arguments)
    values = single_values(typed)
    # an interval has no values, so its setting keeps its default
    swept = {key: texts for key, texts in values.items() if len(texts) > 1}
    grid = [f"{key}={','.join(t.partition('=')[2] for t in v)}" for key, v in swept.items()]
    if grid:
        count = math.prod(len(texts) for texts in swept.values())
        print(f"# the first of {count} settings: {' '.join(grid)}")
    others = [text for text in arguments if text not in (*MULTIRUN, *typed)]
    return [*others, *(texts[0] for texts in values.values() if texts)]
