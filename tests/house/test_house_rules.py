"""Rules of CONTRIBUTING.md that a machine can check."""

import ast
import inspect
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

from inferix_kernels import compiled, ops, reference
from inferix_kernels.__main__ import OPS
from tests import conftest

ROOT = Path(__file__).parents[2]
SOURCES = ("inferix_kernels/**/*.py", "python/**/*.py", "tests/**/*.py", "benchmarks/**/*.py")
PYTHON = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
NATIVE = sorted(path for path in ROOT.glob("csrc/**/*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
MAX_FILE, MEDIAN_FILE, MAX_FUNCTION = 400, 145, 60  # a median of 120 is the aim: it may fall, and must not rise


def names(paths):
    return {"argvalues": paths, "ids": [str(path.relative_to(ROOT)) for path in paths]}


NO_CPP = ("latent_attention", "page_summaries", "page_scores", "select_pages")  # yet: on the CPU the reference serves


@pytest.mark.parametrize(
    "module, op",
    [(reference, op) for op in OPS] + [(compiled, op) for op in OPS if op not in NO_CPP],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_backends_take_what_the_public_op_takes(module, op):
    public = list(inspect.signature(getattr(ops, op)).parameters.values())
    mine = list(inspect.signature(getattr(module, op)).parameters.values())
    assert public.pop().name == "backend"
    # ops.py allocates what may be left out, so that its backends always write to a given tensor.
    assert [(p.name, p.kind) for p in mine if p.name not in ("out", "lse")] == [
        (p.name, p.kind) for p in public if p.name not in ("out", "lse")
    ]
    assert {p.name for p in mine} == {p.name for p in public}


def test_every_public_op_is_listed():
    functions = inspect.getmembers(ops, inspect.isfunction)
    assert {name for name, f in functions if f.__module__ == ops.__name__ and name[0] != "_"} == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_op_documents_its_arguments(op):
    doc, parameters = inspect.getdoc(getattr(ops, op)), inspect.signature(getattr(ops, op)).parameters
    missing = [name for name in parameters if name != "backend" and not re.search(rf"\b{name}\b", doc)]
    assert not missing


@pytest.mark.parametrize("path", **names([*PYTHON, *NATIVE]))
def test_a_file_is_short_or_says_why_not(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE or any("long because" in line.lower() for line in lines[:10])


def long_functions(path: Path) -> dict[str, int]:
    """Lines besides the docstring of each function that is too long and does not say why, in its first lines."""
    text, found = path.read_text(), {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno + 1 - len(doc.splitlines())
            top = text.splitlines()[node.lineno - 1 : node.body[0].end_lineno]
            if lines > MAX_FUNCTION and not any("long because" in line.lower() for line in top):
                found[node.name] = lines
    return found


def test_functions_are_short_or_say_why_not():
    found = {path: long_functions(path) for path in PYTHON}
    assert not {path: functions for path, functions in found.items() if functions}


@pytest.mark.parametrize(
    "body, short",
    [
        ("    x = 1\n" * 59, True),
        ("    x = 1\n" * 60, False),
        ('    """' + "words\n" * 30 + '    """\n' + "    x = 1\n" * 59, True),
        ("    # Long because the table is one.\n" + "    x = 1\n" * 80, True),
        ("    x = 1\n" * 80 + "    # Long because nobody reads this far.\n", False),
    ],
)
@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_a_long_function_is_found(tmp_path, keyword, body, short):
    (tmp_path / "a.py").write_text(f"{keyword} f():\n{body}")
    assert bool(long_functions(tmp_path / "a.py")) == (not short)


def test_the_median_file_is_short():
    lines = [len(path.read_text().splitlines()) for path in PYTHON]
    assert statistics.median(lines) <= MEDIAN_FILE


@pytest.mark.parametrize("path", **names([path for path in PYTHON if path.parent.name == "inferix_kernels"]))
def test_kernels_read_no_environment_and_know_no_driver(path):
    text = path.read_text()
    assert not re.search(r"\bos\.environ|\bgetenv\b", text)
    assert not re.search(r"^\s*(from|import) inferix\b", text, re.MULTILINE)


@pytest.mark.parametrize("path", **names(NATIVE))
def test_native_code_knows_neither_torch_nor_the_environment(path):
    text = path.read_text()
    assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', text) and "getenv" not in text
    assert path.name in ("bindings.cpp", "spans.cpp") or not re.search(r"#include\s*[<\"](Python\.h|pybind11)", text)


def test_the_longest_files_of_tests_come_first_and_are_there():
    longest = [ROOT / "tests" / name for name in conftest.LONGEST]
    assert all(path.exists() for path in longest)
    other = Path(__file__)
    items = [SimpleNamespace(path=path, name=i) for i, path in enumerate([other, *longest[::-1], other])]
    conftest.pytest_collection_modifyitems(items)
    assert [item.path for item in items] == [*longest, other, other]
    assert [item.name for item in items[-2:]] == [0, len(items) - 1]
