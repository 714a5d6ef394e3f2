"""`deploy push`: uploads the adapter of a trial with its tokenizer and its card to the hub.

Nothing else leaves this machine: no row, no loss of an example, no path.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tinyllama_lab.config.command import typed
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.card import BaseModel
from tinyllama_lab.data import hub_requests as requests
from tinyllama_lab.data.hub import is_offline
from tinyllama_lab.deploy.card import complete, full_card, is_edited
from tinyllama_lab.deploy.selection import Selection
from tinyllama_lab.errors import ConfigError, LabError, StudyError, shown
from tinyllama_lab.study.files import SHARED_BYTES
from tinyllama_lab.study.trial import TrialFolder

# files that tokenizers are saved as; any other file in the folder stays here
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_VOCABULARY = ("vocab*", "merges.txt", "*.model", "*.tiktoken", "additional_chat_templates/*")
_NO_CONNECTION = ("ConnectError", "ConnectTimeout", "ProxyError", "ReadTimeout")
_TOKEN_PAGE = "a token with write access, from https://huggingface.co/settings/tokens"


def check_target(to: str) -> None:
    """Check the name of the repository, and that something can be uploaded at all.

    Raises:
        ConfigError: the name is not `user/name`, or the environment forbids the upload.
    """
    problem = "" if re.fullmatch(r"[^/\s]+/[^/\s]+", to) else "it has no owner and name"
    try:
        validate_repo_id(to)
    except HFValidationError as error:
        problem = problem or str(error).partition(":")[0]
    if problem:
        raise ConfigError(
            [f"to must be a repository such as to=user/name, got {shown(to)!r} ({problem})"]
        )
    if is_offline():
        raise ConfigError(
            ["push needs a connection to the hub, and HF_HUB_OFFLINE forbids it; unset it"]
        )
    if not get_token():
        raise ConfigError(
            [f"push needs {_TOKEN_PAGE}, got none; run `hf auth login` or set HF_TOKEN"]
        )


def push(
    selection: Selection, to: str, private: bool, licence: str, say: Callable[[str], None]
) -> str:
    """Upload an adapter, and return the address of its page.

    Args:
        selection: the trial.
        to: the repository; it is made if it does not exist.
        private: whether a repository that is made is private.
        licence: as in `full_card`.
        say: called with what is uploaded.

    Raises:
        StudyError: the folder lacks its tokenizer, or a text in it names a path of this machine.
        LabError: the hub refuses the upload, or cannot be reached.
    """
    trial = selection.trial.row.trial
    _check_adapter(trial)
    if not complete(trial):
        raise StudyError(
            f"push uploads an adapter with its tokenizer, and {trial.adapter_dir} has none, nor "
            "is its base in the cache; load the base once: python -m tinyllama_lab.deploy chat"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _stage(selection, folder, to, licence, say)
        _check_no_path(folder, selection)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for file in files:
            say(f"  {file.relative_to(folder)} ({file.stat().st_size:,} bytes)")
        try:
            requests.with_retries(lambda: _upload(folder, to, private))
        except ConfigError:
            raise
        except Exception as error:  # errors of the client and of its transport share no base class
            raise LabError(_failure(error, to)) from error
    return f"{requests.endpoint()}/{to}"


def _check_adapter(trial: TrialFolder) -> None:
    """Check that a trial has an adapter.

    Raises:
        StudyError: it trained the whole model.
    """
    science: Science = part(Science, trial.read_config())
    if science.lora.is_full:
        raise StudyError(
            f"push uploads adapters, and {trial.folder.name} trained the whole model; merge it to "
            "a folder, and upload that with: hf upload owner/name folder"
        )


def _upload(folder: Path, to: str, private: bool) -> None:
    api = HfApi(endpoint=requests.endpoint())
    api.create_repo(to, private=private, exist_ok=True)
    # one that was there before keeps its visibility
    if private and not api.repo_info(to).private:
        raise ConfigError(
            [
                f"private=true needs a private repository, and {to} is public; set private=false "
                "to publish there, or choose another name"
            ]
        )
    message = "Upload an adapter of tinyllama_lab"
    api.upload_folder(repo_id=to, folder_path=folder, commit_message=message)


def _stage(
    selection: Selection, folder: Path, to: str, licence: str, say: Callable[[str], None]
) -> None:
    """Copy what is uploaded into an empty folder."""
    trial = selection.trial.row.trial
    for pattern in (*_TOKENIZER, *_VOCABULARY):
        for file in trial.adapter_dir.glob(pattern):
            if file.is_file():
                target = folder.joinpath(file.relative_to(trial.adapter_dir))
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    shutil.copyfile(trial.weights_file, folder.joinpath(trial.weights_file.name))
    config = json.loads(trial.adapter_config_file.read_text(encoding="utf-8"))
    base = BaseModel.of(trial)
    config |= {"base_model_name_or_path": base.repo, "revision": base.revision}
    if base.repo is None:
        say("note: the base is not on the hub; the card names it, and nobody else can load it")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.joinpath(trial.adapter_config_file.name).write_text(text, encoding="utf-8")
    if is_edited(trial):
        say(f"note: the card is {trial.card_file} as you edited it")
        card = trial.card_file.read_text(encoding="utf-8")
    else:
        card = full_card(selection, licence, adapter=to).text()
    folder.joinpath(trial.card_file.name).write_text(card, encoding="utf-8")


def _check_no_path(folder: Path, selection: Selection) -> None:
    """Check that no text to be uploaded names a folder of this machine.

    Raises:
        StudyError: one does.
    """
    places = {selection.study.root.absolute(), Path.cwd(), Path.home()}
    places |= {place.resolve() for place in places}
    named = [str(place) for place in places if len(place.parts) > 1]  # "/" names no machine
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.stat().st_size < SHARED_BYTES and file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8", errors="replace")
            if found := next((each for each in named if f"{each}/" in text), None):
                raise StudyError(
                    f"what is uploaded must not name a folder of this machine, and {file.name} "
                    f"holds {found}; correct it in {selection.trial.row.trial.adapter_dir}"
                )


def _failure(error: BaseException, to: str) -> str:
    """Return the message for an upload that failed."""
    cause: Any = error
    while cause.__cause__ is not None and requests.status_of(cause) is None:
        cause = cause.__cause__  # huggingface_hub wraps errors of single files
    status, reason = requests.status_of(cause), shown(requests.reason(cause), 160)
    target = typed("to", to)
    if status == 401:
        return f"push needs {_TOKEN_PAGE}, got one that the hub does not know; run `hf auth login`"
    if status == 403:
        return (
            f"{target} must be a repository that your token may write to, got {reason}; take "
            f"{_TOKEN_PAGE}, or your own user name in to="
        )
    if status == 404:
        return (
            f"{target} must be a repository of a user or an organization that the hub has, got "
            f"{reason}; correct the name"
        )
    if type(cause).__name__ in _NO_CONNECTION:
        return (
            f"push needs the hub, and {requests.endpoint()} does not answer ({reason}); check the "
            "network, HTTPS_PROXY and HF_ENDPOINT, and try again"
        )
    if requests.may_pass(cause):
        return f"the hub must answer the upload to {target}, got {reason}; try again later"
    return f"the upload to {target} failed: {type(cause).__name__}: {reason}"
