"""Attacks by the folders of models and adapters that somebody else made."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.attacks.attack import Attack
from tests.attacks.ground import Ground
from tinyllama_lab.errors import LabError

PICKLE = b"cos\nsystem\n(S'touch touched-by-an-attack'\ntR."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Change = Callable[[Path], None]


@cache
def _base() -> Any:
    from tests.grid import plain
    from tinyllama_lab.config.schema import ModelConfig, QuantConfig, part
    from tinyllama_lab.core.models.loading import load_base

    raw = plain("model=tiny_random", "quant=none")
    model: ModelConfig = part(ModelConfig, {**raw["model"], "identity": "1"})
    return load_base(model, part(QuantConfig, raw["quant"]), "fp32", "cpu")


@cache
def _adapter() -> Path:
    import peft

    folder = Path(tempfile.mkdtemp())
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(_base().model, config)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    adapted.unload()
    return folder


def _adapter_attack(id: str, kind: str, what: str, change: Change, says: str) -> Attack:
    """Return an attack that changes a whole adapter; attaching it is refused."""

    def run(ground: Ground) -> None:
        from tinyllama_lab.config import limited
        from tinyllama_lab.core.models import lora

        folder = ground.work / "adapter"
        shutil.copytree(_adapter(), folder)
        change(folder)
        quick = partial(limited.limited, seconds=1.0)
        with patch.object(lora, "limited", lambda what, remedy, seconds: quick(what, remedy)):
            with pytest.raises(LabError, match=says):
                lora.attach_saved(_base().model, folder)
        ground.check_untouched()

    return Attack(id, kind, what, run)


def _settings(**changed: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / _CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return change


def _file(name: str, content: bytes) -> Change:
    return lambda folder: folder.joinpath(name).write_bytes(content) and None


def _weights(change: Callable[[Any], Any]) -> Change:
    def save(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = folder / _WEIGHTS
        save_file({name: change(each) for name, each in load_file(file).items()}, file)

    return save


def _cut(folder: Path) -> None:
    file = folder / _WEIGHTS
    file.write_bytes(file.read_bytes()[:-7])


_NO_PICKLE = "a pickle, which may run any code"
PICKLES = [
    _adapter_attack("weights", "S6", "an adapter's weights", _file("x.bin", PICKLE), _NO_PICKLE),
    _adapter_attack("args", "S6", "arguments", _file("training_args.bin", PICKLE), _NO_PICKLE),
    _adapter_attack("state", "S6", "an optimizer", _file("optimizer.PT", PICKLE), _NO_PICKLE),
    _adapter_attack("pkl", "S6", "a .pkl", _file("state.pkl", PICKLE), _NO_PICKLE),
]


def _folder_of_pickles(ground: Ground) -> None:
    from tinyllama_lab.core.models import tiny

    shutil.copytree(tiny.folder(), ground.work / "evil")
    (ground.work / "evil" / "model.safetensors").unlink()
    ground.write("evil/pytorch_model.bin", PICKLE)
    ground.sweep_refused("model=local", "model.path=evil", says="pytorch_model.bin, a pickle")


def _code_of_a_model(ground: Ground) -> None:
    from tests.grid import plain
    from tinyllama_lab.config.schema import ModelConfig, QuantConfig, part
    from tinyllama_lab.core.models import tiny
    from tinyllama_lab.core.models.loading import load_base

    folder = ground.work / "evil"
    shutil.copytree(tiny.folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("open('touched-by-an-attack', 'w')\n")
    raw = plain("model=local", f"model.path={folder}", "quant=none")
    model: ModelConfig = part(ModelConfig, {**raw["model"], "identity": "1"})
    with pytest.raises(LabError, match="such code is never run"):
        load_base(model, part(QuantConfig, raw["quant"]), "fp32", "cpu")
    ground.sweep_refused("model=local", f"model.path={folder}", says="such code is never run")


MODELS = [
    Attack("base", "S6", "a base whose weights are a pickle", _folder_of_pickles),
    Attack("auto-map", "S7", "a model with code of its own", _code_of_a_model),
    _adapter_attack(
        "mapping",
        "S7",
        "a library for an adapter to import",
        _settings(auto_mapping={"parent_library": "antigravity", "base_model_class": "X"}),
        "auto_mapping",
    ),
    _adapter_attack(
        "megatron",
        "S7",
        "a module for an adapter to import",
        _settings(megatron_config={"a": 1}, megatron_core="antigravity"),
        "megatron",
    ),
    _adapter_attack(
        "tokenizer",
        "S7",
        "a tokenizer with code",
        _settings(tokenizer_kwargs={"trust_remote_code": True}),
        "unknown setting tokenizer_kwargs",
    ),
    _adapter_attack(
        "kind", "S7", "another kind of adapter", _settings(peft_type="PROMPT_TUNING"), "peft_type"
    ),
    _adapter_attack(
        "targets",
        "S8",
        "an expression that never ends",
        _settings(target_modules="([a-z_.0-9]+)+!"),
        "must take at most 1 s",
    ),
    _adapter_attack(
        "pattern",
        "S8",
        "an expression in the ranks",
        _settings(rank_pattern={"(a+)+$": 4}),
        "the name",
    ),
    _adapter_attack(
        "list", "S8", "one in a list", _settings(target_modules=["(a+)+$"]), "the name"
    ),
    _adapter_attack("json", "S9", "no JSON", _file(_CONFIG, b"[" * 100_000), "as JSON"),
    _adapter_attack("cut", "S9", "weights cut short", _cut, "must hold the weights"),
    _adapter_attack(
        "header",
        "S9",
        "a header of a terabyte",
        _file(_WEIGHTS, struct.pack("<Q", 2**40) + b"{}"),
        "must hold the weights",
    ),
    _adapter_attack(
        "offsets",
        "S9",
        "offsets beyond the file",
        _file(
            _WEIGHTS,
            struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}  ',
        ),
        "must hold the weights",
    ),
    _adapter_attack("nan", "S9", "NaN", _weights(lambda t: t * float("nan")), "finite weights"),
    _adapter_attack(
        "shape",
        "S9",
        "another shape",
        _weights(lambda t: t.repeat(2, 2)),
        "an adapter of this base",
    ),
]


def _template(id: str, what: str, template: str, says: str) -> Attack:
    def run(ground: Ground) -> None:
        from tinyllama_lab.config.limited import limited as unchanged
        from tinyllama_lab.core import limited
        from tinyllama_lab.core.dataset.chat_template import ChatTemplate
        from tinyllama_lab.data.formats.cells import UnusableRow

        tokenizer = _base().tokenizer
        quick = partial(unchanged, seconds=1.0)
        messages = [{"role": "user", "content": "Hi"}]
        with (
            patch.object(tokenizer, "chat_template", template),
            patch.object(limited, "limited", quick),
            pytest.raises((LabError, UnusableRow), match=says),
        ):
            print(ChatTemplate(tokenizer).prompt(messages))
        ground.check_untouched()

    return Attack(id, "S10", what, run)


_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = [
    _template("loop", "loops", _LOOP, "must take at most 1 s"),
    _template("memory", "gigabytes", "{{ ('a' * 99999999) * 40 }}", "must take at most"),
    _template("output", "a long answer", "{{ 'a' * 68000000 }}", "must (write|take) at most"),
    _template("class", "Python's classes", "{{ ''.__class__.__mro__[1] }}", "unsafe"),
    _template("globals", "globals", "{{ raise_exception.__globals__['os'] }}", "unsafe"),
    _template("include", "files", "{% include '/etc/passwd' %}", "the chat template says"),
]
ATTACKS = [*PICKLES, *MODELS, *TEMPLATES]
