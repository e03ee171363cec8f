"""Who imports whom: of every module of a tree, the modules of the tree that it names, wherever in the file."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]  # module -> modules that it imports


def modules(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Every module's file, by its full name; a package's is its __init__.py, an extension's its stub.

    Args:
        folders: of each top-level package, by its name.
    """
    found = {}
    for package, folder in folders.items():
        for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.pyi"))):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def graph(files: Mapping[str, Path]) -> Graph:
    """Imports at the top, inside functions and for type checkers alone. Not seen: importlib.import_module."""
    return {name: imported(name, path, files) - {name} for name, path in files.items()}


def imported(name: str, path: Path, files: Mapping[str, Path]) -> set[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    wanted = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # a module of the package, or a name in it
                wanted.add(full if (full := f"{stem}.{alias.name}") in files else stem)
    return wanted & files.keys()


def circles(edges: Graph) -> list[list[str]]:
    """Sets of modules each of which can be reached from each other one (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        open_.append(name)
        for other in sorted(edges[name]):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in open_:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            at = open_.index(name)
            members = sorted(open_[at:])
            del open_[at:]
            if len(members) > 1:
                found.append(members)

    for name in sorted(edges):
        if name not in order:
            visit(name)
    return found
