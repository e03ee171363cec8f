"""Rules of CONTRIBUTING.md that a machine can check."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from inferix_kernels import compiled, ops, reference
from inferix_kernels.__main__ import OPS

ROOT = Path(__file__).parents[2]
SOURCES = ("inferix_kernels/**/*.py", "python/**/*.py", "tests/**/*.py", "benchmarks/**/*.py")
PYTHON = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
NATIVE = sorted(path for path in ROOT.glob("csrc/**/*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
MAX_FILE, MAX_FUNCTION = 400, 60


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
    assert {name for name, f in functions if f.__module__ == ops.__name__} == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_op_documents_its_arguments(op):
    doc, parameters = inspect.getdoc(getattr(ops, op)), inspect.signature(getattr(ops, op)).parameters
    missing = [name for name in parameters if name != "backend" and not re.search(rf"\b{name}\b", doc)]
    assert not missing


@pytest.mark.parametrize("path", **names([*PYTHON, *NATIVE]))
def test_a_file_is_short_or_says_why_not(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE or any("long because" in line.lower() for line in lines[:10])


@pytest.mark.parametrize("path", **names([p for p in PYTHON if {"inferix_kernels", "benchmarks"} & {*p.parts}]))
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            length = node.end_lineno - node.lineno + 1 - len(doc.splitlines())
            assert length <= MAX_FUNCTION, f"{node.name} has {length} lines besides its docstring"


@pytest.mark.parametrize("path", **names([path for path in PYTHON if path.parent.name == "inferix_kernels"]))
def test_kernels_read_no_environment_and_know_no_driver(path):
    text = path.read_text()
    assert not re.search(r"\bos\.environ|\bgetenv\b", text)
    assert not re.search(r"^\s*(from|import) inferix\b", text, re.MULTILINE)


@pytest.mark.parametrize("path", **names(NATIVE))
def test_native_code_knows_neither_torch_nor_the_environment(path):
    text = path.read_text()
    assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', text) and "getenv" not in text
    assert path.name == "bindings.cpp" or not re.search(r"#include\s*[<\"](Python\.h|pybind11)", text)
