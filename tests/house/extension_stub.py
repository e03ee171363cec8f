"""Writes inferix_kernels/_C.pyi, the extension's types, from the signatures that pybind11 gives its functions.

Run `python -m tests.house.extension_stub` when bindings.cpp has changed and the extension was built again.
"""

from __future__ import annotations

import re
import types
from pathlib import Path

from inferix_kernels import _C

STUB = Path(__file__).parents[2] / "inferix_kernels" / "_C.pyi"
HEAD = '''"""Compiled kernels, as functions over raw addresses: see csrc/bindings.cpp.

Made by `python -m tests.house.extension_stub`; a test compares the two. `arguments` has a value for every field of the
op's struct in csrc/, and nothing else; a struct within it is a dict in turn. An address is a tensor's data_ptr(), 0
where the tensor is optional and absent.
"""

from typing import ClassVar
'''
CUDA = "\n# Only in a build with CUDA.\n"
# What pybind11 says (3.x, and 2.x where it differs), and what callers have to give.
WORDS = [
    (r"inferix_kernels\._C\.|typing\.|collections\.abc\.", ""),
    (r"SupportsInt \| SupportsIndex", "int"),
    (r"SupportsFloat \| SupportsIndex", "float"),
    (r"Optional\[(\w+)\]", r"\1 | None"),
    (r"\*args\b(?!:)", "*args: object"),
]
KINDS = (type, types.BuiltinFunctionType)
ENUM = """\
    __members__: ClassVar[dict[str, {name}]]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
"""
ORDER = "".join(f"    def __{name}__(self, other: {{name}}) -> bool: ...\n" for name in ("lt", "le", "gt", "ge"))


def written(signature: str, indent: str = "") -> str:
    """A signature as pybind11 documents it, as a stub has it: one argument a line."""
    for pattern, word in WORDS:
        signature = re.sub(pattern, word, signature)
    name, arguments, result = re.fullmatch(r"(\w+)\((.*)\) -> (.+)", signature).groups()
    if not arguments:
        return f"{indent}def {name}() -> {result}: ...\n"
    lines = re.split(r", (?=\w+: |\*)", arguments)
    if any(line.startswith("arg0:") for line in lines):  # pybind11's name for what has none
        lines.append("/")
    inside = "".join(f"{indent}    {line},\n" for line in lines)
    return f"{indent}def {name}(\n{inside}{indent}) -> {result}: ...\n"


def of_class(name: str, kind: type) -> str:
    if issubclass(kind, Exception):
        return f"class {name}(Exception): ...\n"
    members = getattr(kind, "__members__", None)
    if members is None:
        signature = kind.__init__.__doc__.splitlines()[0]
        signature = re.sub(r"self: [\w.]+", "self", signature)
        return f"class {name}:\n" + written(signature, "    ")
    lines = "".join(f"    {member}: ClassVar[{name}]\n" for member in members)
    order = ORDER.format(name=name) if "__lt__" in vars(kind) else ""
    return f"class {name}:\n{lines}" + ENUM.format(name=name) + order


def of_name(name: str) -> str:
    thing = getattr(_C, name)
    if isinstance(thing, type):
        return of_class(name, thing) + "\n"
    if isinstance(thing, KINDS[1]):
        return written(thing.__doc__.splitlines()[0])
    return f"{name}: {type(thing).__name__}\n"


def common() -> str:
    """The part of the stub that holds for every build: numbers, classes, functions."""
    names = sorted(name for name in vars(_C) if not name.startswith(("__", "probe_")))
    types_, functions = ([name for name in names if isinstance(getattr(_C, name), kind)] for kind in KINDS)
    numbers = [name for name in names if name not in types_ + functions]
    blocks = ["".join(map(of_name, group)) for group in (numbers, types_, functions)]
    return HEAD + "\n" + blocks[0] + "\n" + blocks[1] + blocks[2]


def of_cuda() -> str:
    """The rest, if this is a build with CUDA."""
    return "".join(of_name(name) for name in sorted(vars(_C)) if name.startswith("probe_"))


if __name__ == "__main__":
    rest = of_cuda() if _C.has_cuda else STUB.read_text().partition(CUDA)[2]
    STUB.write_text(common() + CUDA + rest)
