"""`python -m tinyllama_lab.deploy`: uses the adapter of a finished trial outside of its sweep."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tinyllama_lab.errors import ConfigError, ModelError, quiet_interrupt, user_errors

with quiet_interrupt():  # importing these takes a second, in which Ctrl-C may come
    import psutil
    from rich.console import Console

    from tinyllama_lab.config.command import SWEEPS_DIR, study_settings, unquoted
    from tinyllama_lab.config.schema import value_problem
    from tinyllama_lab.deploy.selection import RECOMMENDED, Selection, select
    from tinyllama_lab.output import accept_any_text, line_width
    from tinyllama_lab.report.exports import print_exports
    from tinyllama_lab.study.exports import MERGED, ORIGINAL, Exports
    from tinyllama_lab.study.files import exists, user_path
    from tinyllama_lab.study.machine import share_cores
    from tinyllama_lab.study.study import StudyFolder

if TYPE_CHECKING:  # imports torch
    from tinyllama_lab.deploy.export import Wanted

_HELP = f"""\
python -m tinyllama_lab.deploy chat [study=ranks] [trial=best]

  (nothing)  merge, write GGUF files, measure all of them beside the adapter as trained
  chat       talk to the adapter; --once "question" prints one answer
  serve      OpenAI's API and a chat page, over the base and all adapters of the study
  merge      write the base with the adapter in its weights, as transformers saves a model
  gguf       write the merged model for llama.cpp and Ollama, with a Modelfile
  card       write the adapter's README: data, settings, results, verdicts, licences
  push       upload adapter and card to the Hugging Face hub

  study=<the newest>     a study with finished trials
  trial={RECOMMENDED}      or best, a name, a key, or settings such as trial="r=16 n=1500"
  sweeps_dir={SWEEPS_DIR}      where studies are kept

chat:      --once "question", system="...", tokens=256 (the most of an answer), temperature=0,
           seed=0, device=auto (or cpu, cuda)
serve:     port=8000 (0: a free one), host=127.0.0.1 (another one needs TINYLLAMA_LAB_TOKEN in the
           environment), queue=64 (the most requests in progress), tokens=512, device=auto
merge:     to=<folder>, into=dequantized (for a quantized base; or original), force=false
gguf:      types=f16,q8_0,q4_0 (also q4_k_m, and lora: the adapter alone, beside one file of the
           base for all trials of the study), base=f16 (the type of that file), force=false
card:      license=<that of base and data>, force=false (replace a card that you edited)
push:      to=<user/name>, private=true (if it is new), license=<that of base and data>
(nothing)  as gguf with types=f16,q8_0,q4_0,q4_k_m, and device=auto"""


_LAST_PORT = 65535
_COMMON = {"study": "", "trial": RECOMMENDED, "sweeps_dir": SWEEPS_DIR}
_DEVICE = {"device": "auto"}
_CHAT = {"once": "", "system": "", "tokens": "256", "temperature": "0", "seed": "0", **_DEVICE}
_SERVE = {
    **{"port": "8000", "host": "127.0.0.1", "token": "", "queue": "64", "tokens": "512"},
    **_DEVICE,
}
_MERGE = {"to": "", "into": "dequantized", "force": "false"}
_GGUF = {"types": "f16,q8_0,q4_0", "base": "f16", "force": "false"}
_CARD = {"license": "", "force": "false"}
_PUSH = {"to": "", "private": "true", "license": ""}
# llama.cpp is there, since it measures the files
_DEPLOY = {**_GGUF, "types": "f16,q8_0,q4_0,q4_k_m", **_DEVICE}

_LOOK_S, _BUSY_PERCENT = 0.5, 20
_UNMEASURED = "not measured yet: the same command without gguf does that"


class Options:
    """What was typed, over the defaults of a command."""

    def __init__(self, arguments: Sequence[str], defaults: dict[str, str]) -> None:
        """Read `name=value` words; `--once` takes the next word.

        Raises:
            ConfigError: a word is unknown.
        """
        self._values = {**_COMMON, **defaults}
        words = list(arguments)
        if "--once" in words and "once" in self._values:
            at = words.index("--once")
            words[at : at + 2] = [f"once={''.join(words[at + 1 : at + 2])}"]
            # an empty variable of a script must not begin a conversation
            if words[at] == "once=":
                raise ConfigError(['--once needs a question, got none; type --once "Book a room"'])
        for word in words:
            name, sign, value = word.partition("=")
            if name not in self._values or not sign:
                raise ConfigError([f"this command takes {self._names()}, got {word!r}"])
            self._values[name] = value

    def _names(self) -> str:
        return ", ".join(f"{name}=" for name in self._values)

    def text(self, name: str) -> str:
        """Return a value as it was typed."""
        return self._values[name]

    def flag(self, name: str) -> bool:
        """Return a value that is `true` or `false`."""
        return self.choice(name, ("true", "false")) == "true"

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """Return a value that must be one of `choices`."""
        if self._values[name] not in choices:
            raise ConfigError(
                [f"{name} must be {' or '.join(choices)}, got {self._values[name]!r}"]
            )
        return self._values[name]

    def number(self, name: str, least: float, kind: type[float] | type[int]) -> float:
        """Return a number that must not be below `least`."""
        try:
            value = kind(self._values[name])
        except ValueError:
            value = kind(least) - 1
        if not least <= value < math.inf:  # false for NaN
            word = "an integer" if kind is int else "a number"
            raise ConfigError(
                [f"{name} must be {word} from {least:g}, got {self._values[name]!r}"]
            )
        return value

    def device(self) -> str:
        """Return the value of `device`."""
        if problem := value_problem("hardware.device", self._values["device"]):
            raise ConfigError([problem.replace("hardware.device", "device")])
        return self._values["device"]

    def selection(self) -> Selection:
        """Return the trial that was asked for, and say which one it is."""
        folder = self._values["sweeps_dir"]
        # maybe in quotes, as the command that a sweep prints has it
        root = user_path(folder if exists(folder) else unquoted(folder))
        selection = select(root, self._values["study"] or None, self._values["trial"])
        say(f"study {selection.study.name}: {selection.label} ({selection.why})")
        return selection


def say(text: str) -> None:
    """Print a line about what happens, to standard error."""
    print(text, file=sys.stderr, flush=True)


def _chat(arguments: Sequence[str]) -> None:
    options = Options(arguments, _CHAT)
    tokens = int(options.number("tokens", 1, int))
    temperature, seed = options.number("temperature", 0, float), options.number("seed", 0, int)
    device = options.device()
    selection = options.selection()
    from tinyllama_lab.deploy.assistant import Assistant  # late: imports torch
    from tinyllama_lab.deploy.chat import Chat, Style

    assistant = Assistant(selection, device)
    chat = Chat(selection, assistant, Style(tokens, temperature, int(seed)))
    chat.set_system(options.text("system"))
    if options.text("once"):
        chat.answer(options.text("once"))
    else:
        chat.loop()


def _serve(arguments: Sequence[str]) -> None:
    options = Options(arguments, _SERVE)
    if options.text("token"):
        raise ConfigError(
            [
                "every user of this machine can see what is typed, and token= must be a secret; "
                "set the environment variable TINYLLAMA_LAB_TOKEN instead"
            ]
        )
    port = int(options.number("port", 0, int))
    if port > _LAST_PORT:
        raise ConfigError([f"port must be at most {_LAST_PORT}, got {port}"])
    most = int(options.number("queue", 1, int)), int(options.number("tokens", 1, int))
    device = options.device()
    selection = options.selection()
    from tinyllama_lab.deploy.serving.serve import TOKEN_VARIABLE, Address, serve

    token = os.environ.get(TOKEN_VARIABLE, "")
    serve(selection, Address(options.text("host"), port, token), device, most, say)


def _merge(arguments: Sequence[str]) -> None:
    options = Options(arguments, _MERGE)
    into, force = options.choice("into", ("dequantized", "original")), options.flag("force")
    trial = options.selection().trial.row.trial
    from tinyllama_lab.deploy.export import export_merged

    exports, form = Exports(trial.deploy_dir), ORIGINAL if into == "original" else MERGED
    own = exports.original_dir if into == "original" else exports.merged_dir
    target = user_path(options.text("to")) if options.text("to") else own
    if target.resolve() == own.resolve():
        exports.forget_measured([form])
    export_merged(trial, target, into, force)
    print(f"written: {target}")
    if any(row.form == form for row in exports.read_measured()[0]):
        say(f"measured already, for {own}: {exports.measured_file}")
    else:
        say("not measured yet: the same command without merge, to= and into= does that")


def _wanted(options: Options) -> Wanted:
    """Return the GGUF files that were asked for."""
    from tinyllama_lab.deploy.export import KINDS, MODEL_KINDS, Wanted

    kinds = [kind for kind in options.text("types").split(",") if kind]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError([f"types must be of {', '.join(KINDS)}, got {unknown[0]!r}"])
    return Wanted(kinds, options.choice("base", MODEL_KINDS), options.flag("force"))


def _gguf(arguments: Sequence[str]) -> None:
    options = Options(arguments, _GGUF)
    wanted = _wanted(options)
    if not wanted.kinds:
        raise ConfigError(["types must name a type of GGUF file, got ''"])
    selection = options.selection()
    from tinyllama_lab.deploy.export import export_gguf

    for path in export_gguf(selection, wanted, say):
        print(f"written: {path}")
    say(_UNMEASURED)


def _deploy(arguments: Sequence[str]) -> None:
    options = Options(arguments, _DEPLOY)
    wanted, device = _wanted(options), options.device()
    selection = options.selection()
    from tinyllama_lab.deploy.export import deploy

    busy = psutil.cpu_percent(_LOOK_S)  # by others: this process sleeps meanwhile
    rows, problems = deploy(selection, wanted, device, say)
    print_exports(rows, Console(width=line_width()))
    if busy > _BUSY_PERCENT:
        say(
            f"note: other programs kept {busy:.0f} % of the cores busy; end them and deploy again "
            "to compare speeds"
        )
    print(f"written: {selection.trial.row.trial.deploy_dir}")
    _show(selection.study)
    if problems:
        raise ModelError(*problems)


def _show(study: StudyFolder) -> None:
    """Bring the exports to the study's page, and to MLflow if its runs are there."""
    word = "track" if study.tracked_file.exists() else "report"
    command = [sys.executable, "-m", "tinyllama_lab", word, *study_settings(study)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:  # for example, a sweep of this study is running
        last = (ended.stderr or ended.stdout).strip().splitlines()[-1:]
        say(f"note: not shown on the page or in MLflow yet: {' '.join(last)}")
    else:
        print(f"shown on: {study.report_file}")


def _card(arguments: Sequence[str]) -> None:
    options = Options(arguments, _CARD)
    force, licence = options.flag("force"), options.text("license")
    selection = options.selection()
    from tinyllama_lab.deploy.card import write_card

    print(f"written: {write_card(selection, licence, force)}")


def _push(arguments: Sequence[str]) -> None:
    options = Options(arguments, _PUSH)
    private, licence = options.flag("private"), options.text("license")
    from tinyllama_lab.deploy.push import check_target, push

    check_target(options.text("to"))
    selection = options.selection()
    print(f"uploaded: {push(selection, options.text('to'), private, licence, say)}")


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "chat": _chat,
    "serve": _serve,
    "merge": _merge,
    "gguf": _gguf,
    "card": _card,
    "push": _push,
}


def main(arguments: Sequence[str]) -> None:
    """Run one of the commands.

    Raises:
        LabError: the command is wrong, or cannot be carried out.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(_HELP)
    elif arguments and arguments[0] in _COMMANDS:
        _COMMANDS[arguments[0]](arguments[1:])
    elif arguments and "=" not in arguments[0]:
        raise ConfigError(
            [f"the command must be one of {', '.join(_COMMANDS)} or none, got {arguments[0]!r}"]
        )
    else:
        _deploy(arguments)


if __name__ == "__main__":
    accept_any_text()
    share_cores()
    with user_errors():
        main(sys.argv[1:])
