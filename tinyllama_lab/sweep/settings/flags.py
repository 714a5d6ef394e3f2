"""Checks the options of the command line, such as `-m`, before Hydra reads them.

Hydra answers a wrong option with its own usage text. The messages here say what to type instead.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser

from tinyllama_lab.config.command import quoted, sweep_command
from tinyllama_lab.config.validate import nearest
from tinyllama_lab.errors import ConfigError, shown
from tinyllama_lab.sweep.settings.compose import SEARCH_PATH, folders_in
from tinyllama_lab.sweep.settings.unreadable import not_a_setting

MULTIRUN = ("-m", "--multirun")
DRY_RUN = "--dry-run"  # plans the command and starts nothing; Hydra never sees it
_FOLDER_FLAGS = ("--config-dir", "-cd")
# Hydra's options that would read a pickle, or settings that nothing has checked
_REFUSED = {
    "experimental_rerun": "type the settings of the command again",
    "config_path": "put your files into a folder, and type --config-dir=<folder>",
    "config_name": "type experiment=<name> for a file of settings",
    "config_dir": "type it in full: --config-dir=<folder>",  # another spelling of it
    "hydra_help": "type --help",
}


def settings_only(command: str, arguments: Sequence[str], usage: str) -> list[str]:
    """Return the settings of a command that takes no options but `-m`, which it leaves out.

    Raises:
        ConfigError: there is another option.
    """
    typed = [text for text in arguments if text not in MULTIRUN]
    if options := [text for text in typed if text.startswith("-")]:
        raise ConfigError(
            [f"{command} takes only settings, got the option {options[0]}; type {usage}"]
        )
    return typed


def read_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options and settings of a command line as Hydra will.

    Raises:
        ConfigError: an option does not exist, lacks its value, or stands after a setting.
    """
    parser = get_args_parser()
    parser.exit_on_error = False  # argparse would print Hydra's usage and exit
    try:
        parsed, unread = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError([_wrong_value(error)]) from None
    if unread:
        first = arguments[0]
        is_word = "=" not in first and not first.startswith(("-", "~"))
        raise ConfigError([not_a_setting(first) if is_word else _unread(unread, arguments)])
    if problems := [_refusal(name) for name in _REFUSED if getattr(parsed, name)]:
        raise ConfigError(problems)
    return parsed


def _refusal(name: str) -> str:
    return f"--{name.replace('_', '-')} is not an option here; {_REFUSED[name]}"


def _wrong_value(error: argparse.ArgumentError) -> str:
    # argparse names every spelling: `--config-dir/-cd`
    name = str(error.argument_name).partition("/")[0]
    return f"{name}: {error.message}; python -m tinyllama_lab --help shows examples"


def _unread(unread: Sequence[str], arguments: Sequence[str]) -> str:
    """Return the problem of words that argparse could not assign."""
    if wrong := next((word for word in unread if word.startswith("-")), None):
        setting = wrong.lstrip("-")
        if "=" in setting:
            return f"a setting must be typed without dashes, got {wrong!r}; type {setting}"
        # argparse has no public list of its options
        hint = nearest(wrong, list(get_args_parser()._option_string_actions))
        return f"{wrong} is not an option{hint or '; --help lists what there is'}"
    settings = [word for word in arguments if _is_setting(word)]
    options = [word for word in arguments if word not in settings]
    return (
        "options such as -m must come before the settings, got "
        f"{shlex.join(arguments)}; type {sweep_command([*options, *settings])}"
    )


def _is_setting(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def with_folders(arguments: Sequence[str]) -> list[str]:
    """Return the command with `--config-dir=<folder>` replaced by `hydra.searchpath`.

    Hydra accepts the option only before the settings, and only for its own composition. The
    setting also works in the check of the command and in the commands other than a sweep.

    Raises:
        ConfigError: a folder of `--config-dir` does not exist.
    """
    kept: list[str] = []
    folders: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, sign, value = word.partition("=")
        # both forms: `--config-dir=folder` and `--config-dir folder`
        if flag in _FOLDER_FLAGS:
            folders.append(value if sign else next(words, ""))
        elif word.startswith(f"{SEARCH_PATH}="):
            folders += folders_in(word)
        else:
            kept.append(word)
    rule = "--config-dir must name a folder with files such as data/mine.yaml"
    files = [folder.removeprefix("file://") for folder in folders]
    # of a package, Hydra would run the code
    wrong = [p for p in files if "://" in p or not Path(p).expanduser().is_dir()]
    if problems := [f"{rule}, got {shown(path)!r}" for path in wrong]:
        raise ConfigError(problems)
    if not folders:
        return kept
    addresses = [f"file://{Path(path).expanduser().absolute()}" for path in files]
    # behind the options: Hydra accepts no option after a setting
    first = next((n for n, word in enumerate(kept) if _is_setting(word)), len(kept))
    kept.insert(first, f"{SEARCH_PATH}=[{','.join(map(quoted, addresses))}]")
    return kept
