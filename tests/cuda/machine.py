"""CUDA kernels without a GPU: tests/cuda/native emulates one on the CPU and runs the kernels' own source there."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import POINTER, Structure, c_bool, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from unittest import mock

import pytest
from torch import Tensor

from inferix_kernels import compiled
from inferix_kernels.layout import KVPages

NATIVE = Path(__file__).parent / "native"


def build(source: str, folder: Path, *options: str) -> Path:
    """Compile tests/cuda/native/<source> and return what it made."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    made = folder / Path(source).stem
    command = [*compiler.split(), "-std=c++17", "-O1", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", *options,
               f"-I{NATIVE}", "-o", str(made), str(NATIVE / source)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return made


SIMPLE = {"pointer": c_void_p, "long": c_int64, "int": c_int32, "float": c_float, "bool": c_bool}


def structs_of(description: str) -> dict[str, type[Structure]]:
    """The struct that each op takes, from what native/describe.h says of their fields."""
    known: dict[str, type] = dict(SIMPLE)
    ops, sizes, offsets = {}, {}, {}
    for line in description.splitlines():
        if line.startswith("op "):
            _, op, name = line.split()
            ops[op] = name
        elif line.startswith("struct "):
            _, struct, size = line.split()
            sizes[struct], offsets[struct] = int(size), []
        else:
            name, kind, count, offset = line.split()
            offsets[struct].append((name, kind, int(count), int(offset)))
    for struct, fields in offsets.items():
        laid = [(name, known[kind] * count if count > 1 else known[kind]) for name, kind, count, _ in fields]
        known[struct] = type(struct, (Structure,), {"_fields_": laid})
        assert [getattr(known[struct], name).offset for name, *_ in fields] == [offset for *_, offset in fields]
        assert ctypes.sizeof(known[struct]) == sizes[struct]
    return {op: known[name] for op, name in ops.items()}


def filled(kind: type, value):
    """A value as a ctypes type has it: a dict of all its fields for a struct, as compiled.py makes them."""
    if not issubclass(kind, Structure):
        return int(value) if kind is c_int32 else value
    fields = dict(kind._fields_)
    if isinstance(value, list):  # Pools
        return kind((fields["pool"])(*(filled(fields["pool"]._type_, pool) for pool in value)), len(value))
    assert fields.keys() - {"workspace"} == value.keys(), f"{kind.__name__} has other fields"
    return kind(**{name: filled(fields[name], x) for name, x in value.items()})


class Library:
    def __init__(self, source: str, folder: Path):
        self.library = ctypes.CDLL(str(build(source, folder, "-shared", "-fPIC", "-ffp-contract=off")))
        self.library.describe.restype = ctypes.c_char_p
        self.structs = structs_of(self.library.describe().decode())

    def run(self, op: str, like: object, /, **arguments: object) -> None:
        """As compiled._run."""
        function, params = getattr(self.library, op), filled(self.structs[op], arguments)
        function.argtypes, function.restype = [POINTER(type(params))], None
        function(ctypes.byref(params))


class Probes(Library):
    """The kernels of csrc/cuda/probes_sm90.cuh, on CPU tensors."""

    device = "cpu"

    def __init__(self, folder: Path):
        super().__init__("probes.cpp", folder)
        self.library.kinds.restype = ctypes.c_char_p

    def kinds(self) -> dict[str, tuple[tuple[int, int], bool]]:
        """Name -> codecs of keys and values, whether it multiplies in 8 bits: sm90::traits_of, in order."""
        rows = [line.split(" ", 3) for line in self.library.kinds().decode().splitlines()]
        return {name: ((int(k), int(v)), eight_bit == "1") for k, v, eight_bit, name in rows}

    def load(self, pages: KVPages, eight_bit: bool, rows: tuple[int, int], head: int, *written: Tensor) -> None:
        names = ("keys", "values", "key_scales", "value_scales")
        addresses = {name: x.data_ptr() for name, x in zip(names, written, strict=True)}
        self.run(
            "probe_load", pages.k, pages=compiled._pool(pages), shape=compiled._shape(pages), eight_bit=eight_bit,
            first_row=rows[0], second_row=rows[1], head=head, **addresses,
        )  # fmt: skip

    def multiply(self, like: KVPages, eight_bit: bool, values: bool, a: Tensor, b: Tensor, out: Tensor) -> None:
        addresses = {"a": a.data_ptr(), "b": b.data_ptr(), "out": out.data_ptr()}
        self.run("probe_multiply", a, like=compiled._pool(like), eight_bit=eight_bit, values=values, **addresses)


class PageOps(Library):
    """The ops of csrc/cuda/kv_pages.cuh and qkv.cuh, on CPU tensors."""

    def __init__(self, folder: Path):
        super().__init__("pages.cpp", folder)

    def __getattr__(self, op: str):
        def emulated(*args, **kwargs):
            with mock.patch.object(compiled, "_run", self.run):
                return getattr(compiled, op)(*args, **kwargs)

        return emulated
