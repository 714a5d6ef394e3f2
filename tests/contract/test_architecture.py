"""The import rules of the package and forbidden calls, checked on the syntax tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.contract.structure import Package

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets"}
DRIVER_ONLY = {"hydra", "omegaconf", "optuna", "mlflow", "tinyllama_lab.sweep"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "os.system", "os.popen"}
UNSAFE_CALLS |= {"instantiate", "hydra.utils.instantiate", "yaml.unsafe_load", "joblib.load"}
UNSAFE_CALLS |= {"marshal.loads", "torch.hub.load", "np.load", "cpp_extension.load"}


HALVES = {"core", "sweep", "report", "deploy"}
PACKAGE = Package(ROOT)
# Each part may import from those on its left, and never from those on its right.
ORDERS = {
    "package": ("errors", "metrics", "output", "study", "config", "data", "report", "sweep"),
    "worker": ("errors", "metrics", "output", "study", "config", "data", "core", "deploy"),
    "winner": ("core", "report", "deploy"),
    "core": (
        *("core.dataset", "core.models", "core.engines", "core.meter", "core.out_of_memory"),
        *("core.context", "core.evaluation", "core.training", "core.worker"),
    ),
    "sweep": (
        *("sweep.tracking", "sweep.settings", "sweep.plan", "sweep.launchers"),
        *("sweep.execution", "sweep.run", "sweep.search"),
    ),
    "report": ("report.text", "report.analysis", "report.page"),
    "files": ("data.formats", "data.reading", "data.sources", "data.hub"),
    "rows": ("data.formats", "data.rows", "data.splits"),
}


def shared(package: Package) -> list[str]:
    """Return the modules that driver and worker share."""
    return [m for m in package.files if m.split(".")[1:2] and m.split(".")[1] not in HALVES]


def imported_by_name(package: Package) -> list[tuple[str, str]]:
    """Return imports of a module by name: `importlib.import_module` and `__import__`."""
    return [
        (module, ast.unparse(node.args[0]))
        for module, tree in package.trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and re.search(r"import_(module|_)$", ast.unparse(node.func))
    ]


@pytest.mark.parametrize("name", ORDERS)
def test_imports_run_one_way(name: str) -> None:
    assert PACKAGE.against_the_order(ORDERS[name]) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert PACKAGE.circle() == []


@pytest.mark.parametrize("start", ["tinyllama_lab.sweep", "tinyllama_lab.report"])
def test_the_driver_half_never_reaches_the_heavy_libraries(start: str) -> None:
    assert PACKAGE.violations(start, HEAVY) == []


def test_a_report_is_made_from_trial_folders_alone() -> None:
    assert PACKAGE.violations("tinyllama_lab.report", {"tinyllama_lab.sweep"}) == []


def test_the_command_line_and_the_launchers_never_reach_the_heavy_libraries() -> None:
    plugins = Package(ROOT, "hydra_plugins")
    roots = {name for module in plugins.files for name in plugins.reached(module)}
    reached = set().union(*map(PACKAGE.reached, [*roots, "tinyllama_lab.__main__"]))
    assert "tinyllama_lab.sweep.settings.compose" in reached  # it did follow the imports
    assert not {name.split(".")[0] for name in reached} & HEAVY


@pytest.mark.parametrize("module", shared(PACKAGE))
def test_what_both_halves_share_never_reaches_the_heavy_libraries(module: str) -> None:
    assert PACKAGE.violations(module, HEAVY) == []


def test_the_worker_half_never_reaches_the_driver_half() -> None:
    assert PACKAGE.violations("tinyllama_lab.core", DRIVER_ONLY) == []


def test_only_two_modules_import_the_worker_half_and_by_name() -> None:
    names = dict(imported_by_name(PACKAGE))
    assert {m: name for m, name in names.items() if not m.startswith("tinyllama_lab.core")} == {
        "tinyllama_lab": "_MODULES.get(name, _READING)",  # a public name, when it is used
        "tinyllama_lab.data.sources": "f'tinyllama_lab.data.reading.{data.kind.reader}'",
        "tinyllama_lab.report.loaded_trial": "'tinyllama_lab.core.models.trained'",
        "tinyllama_lab.sweep.launchers": "f'{__name__}.{name}'",
        "tinyllama_lab.sweep.launchers.inline": "'tinyllama_lab.core.worker'",
    }
    for half in ("tinyllama_lab.sweep", "tinyllama_lab.report"):
        assert PACKAGE.violations(half, {"tinyllama_lab.core"}) == []


def test_mlflow_is_imported_in_one_file() -> None:
    assert PACKAGE.importers("mlflow") == ["tinyllama_lab.sweep.tracking.tracker"]


def test_files_and_folders_are_renamed_in_one_file() -> None:
    renaming = {
        module for module, tree in PACKAGE.trees.items() if any(map(_renames, ast.walk(tree)))
    }
    assert renaming == {"tinyllama_lab.study.files"}


def _renames(node: ast.AST) -> bool:
    """Return whether a node renames a path; `str.replace` has two arguments."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    called = ast.unparse(node.func)
    is_path = node.func.attr == "rename" or (node.func.attr == "replace" and len(node.args) == 1)
    return is_path or called in ("os.replace", "os.rename", "os.renames", "shutil.move")


def test_paths_below_a_study_are_joined_in_its_own_folder_of_the_package() -> None:
    assert STUDY_PATHS > {"folder", "root", "adapter_dir", "report_dir", "result_file"}
    assert STUDY_NAMES > {"trials", "result.json", "base.lock", "table.csv"}
    assert joined_elsewhere(PACKAGE) == []
    assert joined_elsewhere(Package(ROOT, "benchmarks")) == []


def test_optuna_is_imported_in_one_file() -> None:
    assert PACKAGE.importers("optuna") == ["tinyllama_lab.sweep.search.sampling"]


def study_paths(package: Package) -> tuple[set[str], set[str]]:
    """Return the attributes in `study/` that are paths, and the names on disk that they join."""
    paths, names = set(), set()
    for module, tree in package.trees.items():
        if module.startswith("tinyllama_lab.study."):
            for node in ast.walk(tree):
                if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "Path":
                    paths.add(ast.unparse(node.target))
                elif isinstance(node, ast.FunctionDef) and _is_path_property(node):
                    paths.add(node.name)
                    names |= {_text(joined.right) for joined in _joins(node)} - {""}
    return paths, names


def _is_path_property(node: ast.FunctionDef) -> bool:
    is_property = [ast.unparse(decorator) for decorator in node.decorator_list] == ["property"]
    return is_property and node.returns is not None and ast.unparse(node.returns) == "Path"


def _joins(tree: ast.AST) -> list[ast.BinOp]:
    divisions = (node for node in ast.walk(tree) if isinstance(node, ast.BinOp))
    return [node for node in divisions if isinstance(node.op, ast.Div)]


def _text(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


STUDY_PATHS, STUDY_NAMES = study_paths(PACKAGE)
JOINING = ("joinpath", "with_name", "with_stem", "with_suffix")


def joined_elsewhere(package: Package) -> list[str]:
    """Return expressions outside `study/` that build a path below a study.

    They join something to a path of `StudyFolder`, `TrialFolder` or `Pack`, or to any other path
    one of the names on disk. A path that was put into a variable first is found by that name only.
    """
    return [
        f"{module}: {ast.unparse(node)}"
        for module, tree in package.trees.items()
        if not module.startswith("tinyllama_lab.study.")
        for node in ast.walk(tree)
        if _joins_study_path(node)
    ]


def _joins_study_path(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return _is_study_path(node.left) or _is_named(node.left, [node.right])
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    called, method = node.func.value, node.func.attr
    if method == "join":  # os.path.join
        return any(map(_is_study_path, node.args))
    if method in ("glob", "rglob"):  # they list what is there
        return _is_named(called, node.args)
    return method in JOINING and (_is_study_path(called) or _is_named(called, node.args))


def _is_study_path(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in STUDY_PATHS


def _is_named(folder: ast.AST, names: list[ast.expr]) -> bool:
    """Return whether a name on disk is joined to a folder that is no constant of the package."""
    text = ast.unparse(folder)
    is_of_package = text.isupper() or "__file__" in text
    return not is_of_package and any(STUDY_NAMES & {*_text(name).split("/")} for name in names)


def unwanted(root: Path) -> list[str]:
    """Return files with a forbidden name, call or import."""
    found = []
    for path in sorted(root.rglob("*.py")):
        if path.stem in ("utils", "common", "helpers"):
            found.append(f"{path.name}: a name that says nothing")
        for node in ast.walk(ast.parse(path.read_text())):
            if bad := _unsafe(node):
                found.append(f"{path.name}: {bad}")
    return found


def _unsafe(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in UNSAFE_CALLS:
        return name
    if isinstance(node, ast.keyword) and ast.unparse(node) == "shell=True":
        return "shell=True"
    if _trusts(node):
        return "trust_remote_code"
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
    names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
    return next((n for n in names if n.split(".")[0] in ("pickle", "dill", "cloudpickle")), None)


def _trusts(node: ast.AST) -> bool:
    """Return whether code from a hub could run; an explicit False is allowed."""
    pairs: list[tuple[str, ast.AST]] = []
    if isinstance(node, ast.keyword):
        pairs = [(repr(node.arg), node.value)]
    elif isinstance(node, ast.Dict):
        pairs = [(ast.unparse(k), v) for k, v in zip(node.keys, node.values, strict=True) if k]
    return any(k == "'trust_remote_code'" and ast.unparse(v) != "False" for k, v in pairs)


@pytest.mark.parametrize("folder", ["tinyllama_lab", "hydra_plugins"])
def test_no_file_has_an_empty_name_or_an_unsafe_call(folder: str) -> None:
    assert unwanted(ROOT / folder) == []


# ---- the checker itself --------------------------------------------------------------------

PLANTED = {
    "sweep/__init__.py": "",
    "sweep/direct.py": "def late():\n    import torch.nn\n",
    "sweep/through.py": "from tinyllama_lab import shared\n",
    "sweep/relative.py": "from ..shared import thing\n",
    "sweep/clean.py": "import json\nfrom tinyllama_lab.sweep import other\n",
    "sweep/typed.py": "if TYPE_CHECKING:\n    import torch\n    if True:\n        import peft\n",
    "sweep/untyped.py": "if not TYPE_CHECKING:\n    import torch\n",
    "sweep/otherwise.py": "if TYPE_CHECKING:\n    import json\nelse:\n    import torch\n",
    "shared.py": "if True:\n    from peft import PeftModel\n",
    "core/__init__.py": "",
    "core/bad.py": "from tinyllama_lab.sweep import clean\n",
    "core/worse.py": "from hydra.core import hydra_config\n",
    "sweep/by_name.py": "import importlib\nimportlib.import_module('torch')\n__import__('peft')\n",
    "__init__.py": "",
}


@pytest.fixture
def planted(tmp_path: Path) -> Package:
    for name, text in PLANTED.items():
        path = tmp_path / "tinyllama_lab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Package(tmp_path)


def test_the_checker_finds_planted_imports(planted: Package) -> None:
    found = {line.split(" -> ")[0] for line in planted.violations("tinyllama_lab.sweep", HEAVY)}
    bad = ("direct", "through", "relative", "untyped", "otherwise")
    assert found == {f"tinyllama_lab.sweep.{name}" for name in bad}
    core = {
        line.split(" -> ")[0] for line in planted.violations("tinyllama_lab.core", DRIVER_ONLY)
    }
    assert core == {"tinyllama_lab.core.bad", "tinyllama_lab.core.worse"}
    assert [name for _, name in imported_by_name(planted)] == ["'torch'", "'peft'"]
    assert shared(planted) == ["tinyllama_lab.shared"]


def test_the_checker_finds_a_planted_circle_and_a_step_back(tmp_path: Path) -> None:
    texts = {
        "low.py": "def late():\n    from tinyllama_lab.high import over\n",
        "high/__init__.py": "",
        "high/over.py": "from tinyllama_lab import middle\n",
        "middle.py": "if TYPE_CHECKING:\n    import tinyllama_lab.low\n",
        "alone.py": "from tinyllama_lab import high\n",
    }
    for name, text in texts.items():
        path = tmp_path / "tinyllama_lab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    package = Package(tmp_path)
    assert {name.split(".")[1] for name in package.circle()} == {"low", "high", "middle"}
    assert package.against_the_order(("low", "middle", "high")) == [
        "tinyllama_lab.low -> tinyllama_lab.high",
        "tinyllama_lab.low -> tinyllama_lab.high.over",
    ]
    assert package.against_the_order(("high", "alone")) == []


@pytest.mark.parametrize(
    "text",
    [
        "study.folder / name",
        "trial.adapter_dir / 'notes' / 'a.txt'",
        "folder / 'result.json'",
        "root.glob('*/trials')",
        "study.optuna_file.with_name('x')",
        "os.path.join(trial.folder, 'x')",
    ],
)
def test_the_checker_finds_paths_joined_outside_the_study_folder(
    tmp_path: Path, text: str
) -> None:
    module = tmp_path / "tinyllama_lab" / "sweep" / "bad.py"
    module.parent.mkdir(parents=True)
    allowed = "CONF_DIR / 'config.yaml'; name / size; ', '.join(names); trial.folder.glob('*')"
    module.write_text(f"{allowed}\n{text}\n")
    assert len(joined_elsewhere(Package(tmp_path))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "load(trust_remote_code=True)",
        "load(**{'trust_remote_code': True})",
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "run('ls', shell=True)",
        "torch.load('x')",
        "yaml.load(text)",
    ],
)
def test_the_checker_finds_planted_calls(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    (tmp_path / "utils.py").write_text("model.eval()\nload(trust_remote_code=False)\n")
    assert len(unwanted(tmp_path)) == 2
