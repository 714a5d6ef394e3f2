"""Published numbers of five small projects, held against whatever studies are here."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama_lab.data.sources import shown
from tinyllama_lab.errors import StudyError
from tinyllama_lab.metrics import HELDOUT_LOSS, METRICS, PERPLEXITY
from tinyllama_lab.report.analysis.comparable import Comparable, comparable
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.findings import NOT_MEASURED, Claim, effect, metric, sensitivity
from tinyllama_lab.study.study import Study

_V01 = {"model.name": "tinyllama_v01", "data.name": "bitext_travel", "quant.kind": "nf4"}
_ALPACA = {
    "model.name": "tinyllama",
    "data.name": "alpaca",
    "data.n": 1000,
    "data.mask": "response",
    "lora.r": 8,
    "lora.targets": "attention",
    "train.max_steps": 500,
}
_DOLLY = {"model.name": "tinyllama", "data.name": "dolly"}
_R3_BASE = {**_DOLLY, "data.mask": "all", "data.style": "instruction_response"}
_R3 = {**_R3_BASE, "lora.targets": "attention_qv", "train.epochs": 3, "quant.kind": "none"}
_QUALITY = {  # published before and after training
    "bleu": (5.41, 5.62),
    "rouge1": (0.2553, 0.2309),
    "rouge2": (0.1033, 0.0912),
    "rougeL": (0.1975, 0.1771),
}


def _label(name: str) -> str:
    return METRICS[f"eval/{name}"].label


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "R0", "training takes 1.62 GB", _V01, "T4", metric("memory/train_peak_mib", "{:.0f} MiB")
    ),
    Claim(
        "R0", "inference takes 1.03 GB", _V01, "T4", metric("memory/infer_peak_mib", "{:.0f} MiB")
    ),
    Claim(
        "R0",
        "about 12 tokens/s",
        _V01,
        "T4",
        metric("perf/decode_tokens_per_s", "{:.1f} tokens/s"),
    ),
    Claim(
        "R1",
        "2.25 M trainable",
        {name: _ALPACA[name] for name in ("model.name", "lora.r", "lora.targets")},
        "",
        metric("size/trainable_params", "{:.0f}"),
    ),
    *(
        Claim("R1", f"{_label(name)} {value:g} {who}", _ALPACA, "", metric(f"{group}/{name}"))
        for name, (before, after) in _QUALITY.items()
        for who, group, value in (("before", "base", before), ("after", "eval", after))
    ),
    Claim(
        "R2",
        "fits into 8 GB",
        {**_DOLLY, "quant.kind": "nf4"},
        "3070",
        metric("memory/train_peak_mib", "{:.0f} MiB"),
    ),
    Claim("R2", "4-bit is more sensitive to the learning rate", _DOLLY, "", sensitivity),
    Claim("R3", "base loss 2.124", _R3_BASE, "", metric("base/loss")),
    *(
        Claim(
            "R3",
            f"loss {loss} with r {r}, n {n}",
            {**_R3, "lora.r": r, "data.n": n},
            "",
            metric(HELDOUT_LOSS),
        )
        for r, n, loss in ((8, 1500, 1.698), (16, 1500, 1.698), (16, 3000, 1.680))
    ),
    Claim("R3", "r 16 gives little over r 8", _R3, "", effect("lora.r", 8, 16)),
    Claim("R3", "3,000 rows give little over 1,500", _R3, "", effect("data.n", 1500, 3000)),
    Claim(
        "R4",
        "runs on a T4 (no numbers published)",
        {"model.name": "tinyllama", "data.name": "indicvault"},
        "T4",
        metric(PERPLEXITY, "perplexity {:.2f}"),
    ),
)


def print_claims(root: Path, console: Console) -> None:
    """Claim | measured | interval | comparable?, for each reference project."""
    studies = _studies(root)
    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=(0, 1))
    for head in ("project", "claim", "measured", "95 %", "comparable?"):
        table.add_column(head)
    for claim in CLAIMS:
        found = claim.find(studies, claim)
        same = "-" if found.measured == NOT_MEASURED else found.differs or "yes"
        cells = (claim.project, claim.text, found.measured, found.interval or "-", same)
        table.add_row(*(Text(shown(cell, 300)) for cell in cells))
    console.print(table)


def _studies(root: Path) -> list[Comparable]:
    names = sorted(path.parent.name for path in root.glob("*/trials"))
    found = []
    for name in names:
        try:
            found.append(comparable(read_study(Study(root, name)).trials, by_text=False))
        except StudyError:
            continue  # a damaged study has nothing to say; its own report names the damage
    return [each for each in found if each.trials]
