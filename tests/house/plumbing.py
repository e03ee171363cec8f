"""What one more parameter or op costs, counted for those that are there: `python -m tests.house.plumbing`.

A line hands a parameter on if its code has the parameter's name, in any case, as a word of its own: where it is
declared, passed, unpacked or used, in Python, Triton, C++ and CUDA under inferix_kernels/ and csrc/. Comments,
docstrings and messages are not code. itertools' `accumulate` is not the parameter, and what latent_attention's own
functions and module hand on is that op's parameter of the same name: the second count has both ops.

A file of an op is one whose code has the op's name, or that of one of its kernels (kv_append_cuda), in these folders
and in benchmarks/. Tuned sizes are data that `tune` writes, and who calls an op is no part of it: a peer beside ours
(benchmarks/peers), another library's function over ours (inferix_kernels/integrations), and the schedules of several
ranks (inferix_kernels/distributed), which hand no parameter on either.

One more format is one line of layout.py: tests/ops/test_formats.py adds one there, and asks the rest of the house.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CALLERS = {"peers", "integrations", "distributed"}
PYTHON, NATIVE = {".py"}, {".h", ".cpp", ".cu", ".cuh"}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in PYTHON | NATIVE)


def words(path: Path) -> dict[int, set[str]]:
    """line -> the identifiers in its code, and strings that are one."""
    text = path.read_text()
    if path.suffix in NATIVE:
        blank = re.sub(r"//[^\n]*|/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
        return {i: set(re.findall(r"\w+", line)) for i, line in enumerate(blank.splitlines(), 1)}
    found: dict[int, set[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            found.setdefault(token.start[0], set()).add(token.string)
        elif token.type == tokenize.STRING and re.fullmatch(r"""["']\w+["']""", token.string):
            found.setdefault(token.start[0], set()).add(token.string[1:-1])
    return found


def foreign(path: Path, name: str, others: set[str]) -> set[int]:
    """Lines of a Python file where the name is another's: of a module that it imports, or in a function of `others`."""
    if path.suffix not in PYTHON:
        return set()
    tree = ast.parse(path.read_text())
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names} and not node.level:
            return set(range(1, 1 + len(path.read_text().splitlines())))
        if isinstance(node, ast.FunctionDef) and node.name in others:
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def lines_of(parameter: str, others: set[str]) -> dict[str, list[int]]:
    """file -> the lines that hand on a parameter. others: ops that have one of this name too."""
    found = {}
    for path in sources("inferix_kernels", "csrc"):
        if "distributed" in path.parts:
            continue
        if any(path.stem == other.split("_")[0] for other in others):  # triton_kernels/latent.py
            continue
        skipped = foreign(path, parameter, others)
        mine = [i for i, line in words(path).items() if parameter in {x.lower() for x in line} and i not in skipped]
        if mine:
            found[str(path.relative_to(ROOT))] = sorted(mine)
    return found


def files_of(op: str) -> list[str]:
    """A kernel's functions begin with the op's name: kv_append_cpu, kv_append_cuda."""
    mine = re.compile(rf"{op}(_\w+)?|_?{op}")
    found = [p for p in sources("inferix_kernels", "csrc", "benchmarks") if not CALLERS & set(p.parts)]
    found = [p for p in found if any(mine.fullmatch(x) for line in words(p).values() for x in line)]
    return [str(p.relative_to(ROOT)) for p in found]


def main() -> None:
    for name, others in (("of paged_attention", {"latent_attention"}), ("of both attention ops", set())):
        found = lines_of("accumulate", others)
        print(f"accumulate {name}: {sum(map(len, found.values()))} lines in {len(found)} files")
        for file, lines in found.items():
            print(f"  {file}: {', '.join(map(str, lines))}")
    from inferix_kernels.__main__ import OPS

    for op in OPS:
        found = files_of(op)
        print(f"{op}: {len(found)} files\n  {' '.join(found)}")


if __name__ == "__main__":
    main()
