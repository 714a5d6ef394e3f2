"""The documentation: links, sentences and commands are valid, and marked blocks run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import studies
from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.config.schema import Config
from tinyllama_lab.config.validate import known_keys
from tinyllama_lab.sweep import reference as reference_module
from tinyllama_lab.sweep.check import check_command
from tinyllama_lab.sweep.reference import COMMAND, reference
from tinyllama_lab.sweep.search.settings import NAMES, NODE
from tinyllama_lab.sweep.settings import compose

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT)
    for folder in (".", "docs", "benchmarks", "examples")
    for path in (ROOT / folder).glob("*.md")
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_WORDS, LONGEST_SENTENCE = 900, 30
RECIPES = Path("docs/extending.md")  # its commands need the files that its recipes create
# with options of their own
SUBCOMMANDS = ("ask", "data", "demo", "evaluate", "plan", "report", "ui")
LONG_WINDED = (Path("docs/statistics.md"),)  # it states methods with all their conditions
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S
)
RUNNABLE = re.compile(
    r"^<!-- runs -->\n```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.M | re.S
)
SOURCE = re.compile(r"`((?:\w+/)+\w+\.(?:py|yaml))`")
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def prose(text: str) -> str:
    """Return a page without its code blocks and comments."""
    return re.sub(r"<!--.*?-->", "", BLOCK.sub("", text), flags=re.S)


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them.

    `## What is *held* out` is `what-is-held-out`. A repeated heading gets a number: `notes-1`.
    """
    seen: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.*)$", BLOCK.sub("", text), re.M):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = seen.get(name, 0)
        seen[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page whose file or heading does not exist."""
    broken = []
    text = page.read_text(encoding="utf-8")
    for match in LINK.finditer(re.sub(r"`[^`\n]*`", "", prose(text))):
        target, _, anchor = match["target"].partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = page.parent / target if target else page
        if not file.exists():
            broken.append(f"{match['target']}: no such file")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            broken.append(f"{match['target']}: no such heading")
    return broken


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page, in paragraphs, list items, headings and table cells."""
    for part in re.split(r"\n\s*\n|\n(?=- |\d+\. |#|\|)|\|", prose(text)):
        plain = LINK.sub(lambda match: match[0].partition("]")[0][1:], part)
        yield from re.split(r"(?<=[.!?])\s+", " ".join(plain.split()))


def words(text: str) -> list[str]:
    """Return what counts as a word: text between spaces with at least one letter or digit."""
    return [word for word in text.split() if re.search(r"\w", word)]


def demo_screen() -> str:
    """Return the block of the README that shows what the demo prints."""
    (screen,) = [m[0] for m in BLOCK.finditer(README) if "Confirmation trials" in m["code"]]
    return screen


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(ROOT / page) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_source_files_that_a_page_names_exist(page: Path) -> None:
    """Lines such as `sweep/launchers/nice.py`, new: name files that a recipe creates."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    files = {name for line in lines if ", new" not in line for name in SOURCE.findall(line)}
    files = {name for name in files if not name.startswith("my/")}  # a folder of the user
    folders = (ROOT, ROOT / "tinyllama_lab")
    assert {name for name in files if not any((root / name).exists() for root in folders)} == set()


def commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every sweep or single trial in the bash blocks of a page."""
    for block in BLOCK.finditer(text):
        for line in block["code"].replace("\\\n", " ").splitlines():
            start, program, typed = line.partition("python -m tinyllama_lab ")
            arguments = shlex.split(typed, comments=True) if program and not start.strip() else []
            if arguments and arguments[0] not in SUBCOMMANDS and "$A" not in arguments:
                yield [word for word in arguments if word != "--dry-run"]  # of `plan`


@pytest.mark.parametrize("page", sorted({*PAGES} - {RECIPES}), ids=str)
def test_commands_have_existing_settings_and_valid_values(page: Path) -> None:
    for arguments in commands((ROOT / page).read_text(encoding="utf-8")):
        check_command(arguments)


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        links = LINK.finditer(page.read_text(encoding="utf-8"))
        targets = (match["target"].partition("#")[0] for match in links)
        todo += [(page.parent / t).resolve() for t in targets if t and "://" not in t]
    assert {ROOT / page for page in PAGES} <= reached


def test_the_readme_is_short_apart_from_the_demo_screen() -> None:
    assert len(words(README.replace(demo_screen(), ""))) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_sentences_are_short(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"<!-- counted -->.*?<!-- end -->", "", text, flags=re.DOTALL)  # generated
    long = [sentence for sentence in sentences(text) if len(words(sentence)) > LONGEST_SENTENCE]
    assert page in LONG_WINDED or long == []


def test_the_reference_is_what_conf_and_the_schema_say() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference(), f"run {COMMAND}"


def test_the_reference_has_one_row_for_every_setting_with_its_bounds_and_default() -> None:
    text = reference()
    searched = [f"{NODE}.{name}" for name in NAMES]
    assert sorted(re.findall(r"^\| `([\w.]+)` \|", text, re.M)) == sorted(
        [*known_keys(Config), *searched]
    )
    for row in (
        "| `lora.r` | integer ≥ 1 and ≤ 1024 | `8` | rank |",
        "| `lora.dropout` | number ≥ 0 and < 1 | `0.0` |",
        "| `data.n` | integer ≥ 1 or `all` | *by option* |",
        "| `train.schedule` | `cosine`, `linear`, `constant` | `cosine` |",
        "| `hardware.gpus` | list of integers or list of strings or `null` | `null` |",
        "| `profile` | `auto`, `tinyllama`, `embedded` | `auto` |",
    ):
        assert f"\n{row}" in text
    (dolly,) = re.findall(r"^\| `data=dolly` .*", text, re.M)
    assert "`data.n=1500`" in dolly and "databricks/databricks-dolly-15k" in dolly


def test_another_data_set_changes_no_other_line_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF_DIR, conf)
    before = reference().splitlines()
    lines = ["# Mine.", "defaults: [_base, _self_]", "name: mine", "source: file", "n: 8"]
    lines += ["columns: {prompt: a, response: b}", "style: text", "eval_n: 4", "max_length: 64"]
    (conf / "data" / "mine.yaml").write_text("\n".join(lines))
    for module in (compose, reference_module):
        monkeypatch.setattr(module, "CONF_DIR", conf)
    added = [line for line in reference().splitlines() if line not in before]
    (row,) = added
    assert row.startswith("| `data=mine` | Mine. |") and "`data.style=text`" in row
    assert [line for line in reference().splitlines() if line != row] == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a working folder with a small study `quickstart`."""
    folder = tmp_path_factory.mktemp("docs")
    studies.simulated_study(folder / "sweeps", {"lora.r": [4, 16]}, name="quickstart")
    return folder


def marked_blocks() -> Iterator[Any]:
    """Yield the language and the code of every block after `<!-- runs -->`."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for number, match in enumerate(RUNNABLE.finditer(text)):
            yield pytest.param(match["language"], match["code"], id=f"{page}-{number}")


def test_blocks_are_marked() -> None:
    assert len(list(marked_blocks())) >= 3


@pytest.mark.parametrize(("language", "code"), marked_blocks())
def test_a_marked_block_runs(folder: Path, language: str, code: str) -> None:
    """Blocks run in the order of their page, because one may read what another wrote."""
    program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*program, code],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout, done.stderr


# ---- the checks themselves -----------------------------------------------------------------


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Two words\n\n```\n# no heading\n```\n## Two words\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#two-words) [b](other.md#two-words-1) [c](#here) [d](https://x.y/z)\n"
        "[e](gone.md) [f](other.md#no-heading) [g](#gone) `[code](gone.md)`\n\n# Here!\n"
        "```\n[code](gone.md)\n```\n"
    )
    assert broken_links(page) == [
        "gone.md: no such file",
        "other.md#no-heading: no such heading",
        "#gone: no such heading",
    ]


def test_sentences_are_split_at_full_stops_items_and_cells() -> None:
    text = "# Head\n\nOne two. Three\nfour?\n\n- five [six](x.md)\n- seven\n\n| a | b c |\n"
    split = [words(sentence) for sentence in sentences(text) if words(sentence)]
    expected = [["Head"], ["One", "two."], ["Three", "four?"], ["five", "six"], ["seven"]]
    assert split == [*expected, ["a"], ["b", "c"]]


def test_commands_are_found_in_blocks_without_their_comments() -> None:
    text = (
        "`python -m tinyllama_lab x=1`\n\n```bash\npython -m tinyllama_lab -m lora.r=8,16 \\\n"
        "  'seed=0,1'  # twice\npython -m tinyllama_lab report study=a\n```\n"
    )
    assert list(commands(text)) == [["-m", "lora.r=8,16", "seed=0,1"]]
