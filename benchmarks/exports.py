"""`python -m benchmarks.exports study=...`: do GGUF files say what the adapter says?

Tokens and losses of three ways are compared on held-out rows, all of them in float32:

- transformers with the adapter attached by PEFT, which is the truth;
- the file in llama.cpp;
- the file read by the package `gguf` alone, dequantized and run in transformers.

The third shares no code with the export: a mistake in names, rows or scales shows as a difference.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.models.loading import Base, load_base
from tinyllama_lab.core.models.lora import attach_saved
from tinyllama_lab.deploy.__main__ import Options, say
from tinyllama_lab.deploy.export import MODEL_KINDS, Wanted, export_gguf
from tinyllama_lab.deploy.forms import share_of_same
from tinyllama_lab.deploy.llama_cpp import GgufModel
from tinyllama_lab.deploy.measure import record_of
from tinyllama_lab.deploy.probe import check_prompts, same_tokens, summed_loss
from tinyllama_lab.errors import ConfigError, user_errors
from tinyllama_lab.study.evaluations import CONFIRMATION, HELDOUT
from tinyllama_lab.study.exports import Exports
from tinyllama_lab.study.trial import TrialFolder

_DEFAULTS = {"types": "f16,q8_0,q4_0", "prompts": "50", "tokens": "48"}
Record = dict[str, Any]  # of an example, as the measuring processes get it


@dataclass(frozen=True)
class Truth:
    """What the adapter as trained says, in float32."""

    answers: list[list[int]]  # greedy
    losses: list[float]  # nats, summed over an example


def read_independently(file: Path) -> LlamaForCausalLM:
    """Return the model of a GGUF file in float32, read by nothing of this project."""
    reader = GGUFReader(file)

    def value(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, size = value("attention.head_count"), value("rope.dimension_count")
    weights = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    make: Any = LlamaConfig
    config = make(
        vocab_size=weights["token_embd.weight"].shape[0],
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv"),
        head_dim=size,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings="output.weight" not in weights,
    )
    model = LlamaForCausalLM(config).eval()
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    # rows 0, 2, 4... of a head are its first half in transformers, and 1, 3, 5... its second
    halves = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem = name.removesuffix(".weight")
            if stem in whole:
                stored = weights[f"{whole[stem]}.weight"]
            else:
                number, _, rest = stem.removeprefix("model.layers.").partition(".")
                stored = weights[f"blk.{number}.{inner[rest]}.weight"]
                if inner[rest] in ("attn_q", "attn_k"):
                    starts = np.arange(0, len(stored), size)[:, None]
                    stored = stored[(starts + halves).ravel()]
            parameter.copy_(torch.from_numpy(np.array(stored)))
    return model


@torch.no_grad()
def losses_of(model: Any, records: Sequence[Record]) -> list[float]:
    """Return the loss (nats) of every example, summed over its supervised tokens."""
    losses = []
    for record in records:
        ids, mask = torch.tensor(record["ids"]), torch.tensor(record["loss_mask"])[1:]
        logits = model(ids[None, :-1]).logits[0].double()
        losses.append(float(cross_entropy(logits[mask], ids[1:][mask], reduction="sum")))
    return losses


@torch.no_grad()
def greedy(model: Any, records: Sequence[Record], tokens: int, ends: Sequence[int]) -> Any:
    """Return up to `tokens` greedy tokens after every prompt, without the one that ends it."""
    answers = []
    for record in records:
        prompt = torch.tensor([record["prompt_ids"]])
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
        )
        new = ids[0, prompt.shape[1] :].tolist()
        answers.append(list(takewhile(lambda token: token not in ends, new)))
    return answers


@torch.no_grad()
def chosen(model: Any, records: Sequence[Record], answers: Sequence[list[int]]) -> Any:
    """Return the tokens that a model chooses, each after the true ones before it."""
    choices = []
    for record, answer in zip(records, answers, strict=True):
        ids = torch.tensor([[*record["prompt_ids"], *answer]])
        logits = model(ids).logits[0, len(record["prompt_ids"]) - 1 : -1]
        choices.append(logits.argmax(dim=-1).tolist())
    return choices


def share_before_another(found: Sequence[list[int]], answers: Sequence[list[int]]) -> float:
    """Return the share of the answers' tokens that are said before the first other one."""
    same = 0
    for own, answer in zip(found, answers, strict=True):
        pairs = zip(own, answer, strict=False)
        same += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return same / max(sum(map(len, answers)), 1)


def load_trained(trial: TrialFolder) -> Base:
    """Return the base of a trial in float32, with its adapter attached by PEFT."""
    science: Science = part(Science, trial.read_config())
    base = load_base(science.model, science.quant, "fp32", "cpu")
    base.model = attach_saved(base.model, trial.adapter_dir)  # type: ignore[assignment]
    return base


def unseen(trial: TrialFolder, base: Base, count: int) -> list[Record]:
    """Return rows that were not trained on: those for scoring, then those for confirmation."""
    science: Science = part(Science, trial.read_config())
    data = replace(science.data, n=1, balance_by=None, subset="nested")
    cache = DataCache(base.tokenizer)
    examples = cache.prepare(data, scored=HELDOUT).heldout
    if len(examples) < count and cache.examine(data).confirmation:
        examples = [*examples, *cache.prepare(data, scored=CONFIRMATION).heldout]
    return [record_of(example, base.tokenizer) for example in examples[:count]]


def compare(file: Path, records: Sequence[Record], truth: Truth, tokens: int) -> list[str]:
    """Return a line of the table for each way to run a file."""
    labels = sum(sum(record["loss_mask"][1:]) for record in records)
    exact = sum(truth.losses) / labels

    def line(way: str, losses: list[float], same: float, before: str) -> str:
        loss = sum(losses) / labels
        words = (file.stem, way, f"{loss:.4f}", f"{loss - exact:+.4f}", f"{same:.2%}", before)
        return f"| {' | '.join(words)} |"

    longest = max(len(record["ids"]) for record in records) + tokens + 1
    prompts = [list(record["prompt_ids"]) for record in records]
    with GgufModel(file, longest) as model:
        check_prompts(model, records)
        free = model.answers(prompts, tokens)
        same = same_tokens(model, prompts, truth.answers) or 0.0
        losses = [summed_loss(model, record) for record in records]
    lines = [line("llama.cpp", losses, same, f"{share_before_another(free, truth.answers):.2%}")]
    read = read_independently(file)
    same = share_of_same(chosen(read, records, truth.answers), truth.answers)
    return [*lines, line("gguf, transformers", losses_of(read, records), same, "-")]


def main(arguments: Sequence[str]) -> None:
    """Write missing files, and print the table.

    Raises:
        LabError: the command is wrong, or cannot be carried out.
    """
    options = Options(arguments, _DEFAULTS)
    count, tokens = (int(options.number(name, 1, int)) for name in ("prompts", "tokens"))
    kinds = options.text("types").split(",")
    if unknown := set(kinds) - set(MODEL_KINDS):
        raise ConfigError([f"types must be of {', '.join(MODEL_KINDS)}, got {min(unknown)!r}"])
    selection = options.selection()
    trial = selection.trial.row.trial
    exports = Exports(trial.deploy_dir)
    missing = [kind for kind in kinds if not exports.gguf_file(kind).exists()]
    if missing:
        export_gguf(selection, Wanted(missing, "f16", False), say)
    say("transformers with the adapter, in float32")
    base = load_trained(trial)
    records = unseen(trial, base, count)
    answers = greedy(base.model, records, tokens, base.end_ids)
    truth = Truth(answers, losses_of(base.model, records))
    labels = sum(sum(record["loss_mask"][1:]) for record in records)
    print(
        f"{len(records)} prompts, {sum(map(len, answers))} greedy tokens; loss of {labels} tokens "
        f"in transformers with PEFT: {sum(truth.losses) / labels:.4f}"
    )
    print("| file | run by | loss | difference | same tokens | before the first other one |")
    print("|---|---|--:|--:|--:|--:|")
    for kind in kinds:
        for line in compare(exports.gguf_file(kind), records, truth, tokens):
            print(line, flush=True)


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
