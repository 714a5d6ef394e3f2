"""The structure of the package: sizes of files and functions, importers, and import cycles.

python -m tests.contract.structure              # a summary, and what exceeds the limits
python -m tests.contract.structure --importers  # every module with its importers
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES = 400, 40


class Package:
    """The modules of a package and the imports of each, also inside functions."""

    def __init__(self, root: Path = ROOT, name: str = "tinyllama_lab") -> None:
        self.root, self.name = root, name
        self.files: dict[str, Path] = {}
        for path in sorted((root / name).rglob("*.py")):
            dotted = ".".join(path.relative_to(root).with_suffix("").parts)
            self.files[dotted.removesuffix(".__init__")] = path
        self.trees = {module: ast.parse(path.read_text()) for module, path in self.files.items()}
        self.imports = {m: set(self._imports(m, ast.walk(tree))) for m, tree in self.trees.items()}
        self.run_imports = {  # without those for types alone
            m: set(self._imports(m, _run_nodes(tree))) for m, tree in self.trees.items()
        }

    def _imports(self, module: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                yield source
                yield from (f"{source}.{alias.name}" for alias in node.names)

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return str(node.module)
        is_package = self.files[module].name == "__init__.py"
        parents = module.split(".")[: (None if is_package else -1)]
        parents = parents[: len(parents) - node.level + 1]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def reached(self, module: str) -> set[str]:
        """Return all modules that importing `module` imports, through modules of this package."""
        seen: set[str] = set()
        todo = [module]
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)]
                todo += self.run_imports.get(name, ())
        return seen

    def violations(self, start: str, forbidden: set[str]) -> list[str]:
        """Return the forbidden modules that those below `start` (a prefix) reach."""
        return [
            f"{module} -> {name}"
            for module in self.files
            if _is_below(module, start)
            for name in sorted(self.reached(module))
            if any(_is_below(name, bad) for bad in forbidden)
        ]

    def importers(self, library: str) -> list[str]:
        """Return the modules that import a library directly."""
        return [
            m for m, names in self.imports.items() if library in {n.split(".")[0] for n in names}
        ]

    def inner_imports(self, module: str) -> set[str]:
        """Return the modules of this package that a module imports directly."""
        return {name for name in self.imports[module] if name in self.files and name != module}

    def imported_by(self, module: str) -> list[str]:
        """Return the modules of this package that import a module."""
        return [other for other in self.files if module in self.inner_imports(other)]

    def against_the_order(self, parts: tuple[str, ...]) -> list[str]:
        """Return the imports that lead from a part of an order to a later part.

        A part is a folder or a module below the package. A module belongs to the longest match.
        """
        position = {f"{self.name}.{part}": index for index, part in enumerate(parts)}

        def position_of(module: str) -> int | None:
            matching = [part for part in position if _is_below(module, part)]
            return position[max(matching, key=len)] if matching else None

        violations = []
        for module in self.files:
            for name in sorted(self.inner_imports(module)):
                importer, imported = position_of(module), position_of(name)
                if importer is not None and imported is not None and imported > importer:
                    violations.append(f"{module} -> {name}")
        return violations

    def circle(self) -> list[str]:
        """Return a circle of modules that import each other, also for types only; or empty."""
        graph = {
            module: self.inner_imports(module)
            for module, path in self.files.items()
            if path.name != "__init__.py"
        }
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            return list(error.args[1])
        return []

    def functions(self) -> Iterator[tuple[str, int]]:
        """Yield every function with its number of lines."""
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{module}.{node.name}", (node.end_lineno or 0) - node.lineno + 1

    def lines(self) -> dict[str, int]:
        """Return the number of lines of each file."""
        return {m: len(path.read_text().splitlines()) for m, path in self.files.items()}

    def comment_share(self) -> float:
        """Return the share of lines that are or end with a comment."""
        texts = [path.read_text().splitlines() for path in self.files.values()]
        comments = sum("# " in line for text in texts for line in text)
        return comments / sum(map(len, texts))


def _run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """As `ast.walk`, without what stands below `if TYPE_CHECKING:`, which never runs."""
    yield tree
    is_for_types = isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING"
    children = tree.orelse if isinstance(tree, ast.If) and is_for_types else None
    for child in ast.iter_child_nodes(tree) if children is None else children:
        yield from _run_nodes(child)


def _is_below(module: str, start: str) -> bool:
    return module == start or module.startswith(start + ".")


def main() -> None:
    """Print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--importers", action="store_true", help="every module with its importers")
    package = Package()
    lines, functions = package.lines(), list(package.functions())
    single = [m for m in lines if len(package.imported_by(m)) == 1]
    print(f"files {len(lines)}, lines {sum(lines.values())}, median file {median(lines.values())}")
    print(f"functions {len(functions)}, median {median(n for _, n in functions)} lines")
    print(f"lines with a comment: {package.comment_share():.1%}")
    print(f"modules with one importer: {len(single)}, of these below 60 lines: ", end="")
    print(", ".join(f"{_short(m)} ({lines[m]})" for m in single if lines[m] < 60) or "none")
    _print_beyond("files", list(lines.items()), FILE_LINES)
    _print_beyond("functions", functions, FUNCTION_LINES)
    print(f"circle: {' -> '.join(map(_short, package.circle())) or 'none'}")
    if parser.parse_args().importers:
        for module, count in lines.items():
            importers = ", ".join(map(_short, package.imported_by(module)))
            print(f"{_short(module):48} {count:4}  {importers}")


def _print_beyond(what: str, sizes: list[tuple[str, int]], limit: int) -> None:
    beyond = sorted((name, size) for name, size in sizes if size > limit)
    listed = ", ".join(f"{_short(name)} ({size})" for name, size in beyond)
    print(f"{what} above {limit} lines: {listed or 'none'}")


def _short(module: str) -> str:
    return module.removeprefix("tinyllama_lab.")


if __name__ == "__main__":
    main()
