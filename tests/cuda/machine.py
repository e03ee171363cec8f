"""CUDA kernels without a GPU: tests/cuda/native acts them out on the host, from their own source."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import POINTER, Structure, c_bool, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
from torch import Tensor

from inferix_kernels.layout import KVPages, PageList

NATIVE = Path(__file__).parent / "native"
CODECS = ("f32", "bf16", "f16", "i8_token", "i8_channel", "e4m3_token", "e4m3_channel", "u4_token", "u4_channel")
# How the Hopper kernel multiplies (sm90::Kind): format of the pages, and whether in 8 bits; else codes become bf16.
KINDS = {
    "bf16": ("bf16", False),
    "f16": ("fp16", False),
    "i8f8": ("i8f8", True),
    "fp8": ("fp8", True),
    "wide int8": ("int8", False),
    "wide i8f8": ("i8f8", False),
    "wide fp8": ("fp8", False),
    "wide int4": ("int4", False),
}


def build(source: str, folder: Path, *options: str) -> Path:
    """Compile tests/cuda/native/<source> and return what it made."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    made = folder / Path(source).stem
    command = [*compiler.split(), "-std=c++17", "-O2", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", *options,
               f"-I{NATIVE}", "-o", str(made), str(NATIVE / source)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return made


class Plane(Structure):
    _fields_ = [
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("width", c_int64),
        ("codec", c_int32),
    ]


class Pool(Structure):
    _fields_ = [("k", Plane), ("v", Plane), ("pages", c_int64)]


class Pools(Structure):
    _fields_ = [("pool", Pool * 8), ("count", c_int)]


class Shape(Structure):
    _fields_ = [("H", c_int64), ("page_size", c_int64)]


class Rows(Structure):
    _fields_ = [("data", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64)]


class List(Structure):
    _fields_ = [("ids", c_void_p), ("lens", c_void_p), ("n", c_int64)]


class Append(Structure):
    _fields_ = [("k", Rows), ("v", Rows), ("pages", Pool), ("where", List), ("shape", Shape), ("T", c_int64),
                ("x_dtype", c_int32)]  # fmt: skip


class Commit(Structure):
    _fields_ = [("source", Pool), ("target", Pool), ("source_list", List), ("target_list", List), ("k_mean", c_void_p),
                ("shape", Shape)]  # fmt: skip


class Gather(Structure):
    _fields_ = [("pools", Pools), ("where", List), ("shape", Shape), ("k", Rows), ("v", Rows), ("T", c_int64),
                ("out_dtype", c_int32)]  # fmt: skip


class Prologue(Structure):
    _fields_ = [("qkv", c_void_p), ("q", c_void_p), ("qkv_stride", c_int64), ("bias", c_void_p), ("norm_q", c_void_p),
                ("norm_k", c_void_p), ("norm_q_bias", c_void_p), ("norm_k_bias", c_void_p), ("norm_q_size", c_int64),
                ("norm_k_size", c_int64), ("rope", c_void_p), ("k_mean", c_void_p), ("rope_pairs", c_int64),
                ("interleaved", c_bool), ("eps", c_float), ("pages", Pool), ("where", List), ("shape", Shape),
                ("T", c_int64), ("query_heads", c_int64), ("dtype", c_int32), ("workspace", c_void_p)]  # fmt: skip


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def dtype(x: Tensor) -> int:
    return ("torch.float32", "torch.bfloat16", "torch.float16").index(str(x.dtype))


def pool(pages: KVPages) -> Pool:
    planes = []
    for side, width in zip(pages.sides, (pages.head_dim, pages.value_dim)):
        codec = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "i8", "float8_e4m3fn": "e4m3",
                 "uint8": "u4"}[str(side.codec.dtype).removeprefix("torch.")]  # fmt: skip
        name = codec if side.codec.scaled_by is None else f"{codec}_{side.codec.scaled_by}"
        planes.append(Plane(*map(address, (side.codes, side.scales, side.offsets)), width, CODECS.index(name)))
    return Pool(*planes, pages.pages)


def rows(x: Tensor) -> Rows:
    return Rows(x.data_ptr(), x.stride(0), x.stride(1))


def listed(where: PageList) -> List:
    return List(where.ids.data_ptr(), where.lens.data_ptr(), len(where.ids))


def shape(pages: KVPages) -> Shape:
    return Shape(pages.heads, pages.page_size)


class ProbeLoad(Structure):
    _fields_ = [("pages", Pool), ("shape", Shape), ("eight_bit", c_bool), ("first_row", c_int), ("second_row", c_int),
                ("head", c_int), ("keys", c_void_p), ("values", c_void_p), ("key_scales", c_void_p),
                ("value_scales", c_void_p)]  # fmt: skip


class ProbeMultiply(Structure):
    _fields_ = [("like", Pool), ("eight_bit", c_bool), ("values", c_bool), ("a", c_void_p), ("b", c_void_p),
                ("out", c_void_p)]  # fmt: skip


class Library:
    def __init__(self, source: str, folder: Path):
        self.library = ctypes.CDLL(str(build(source, folder, "-shared", "-fPIC", "-ffp-contract=off")))

    def run(self, op: str, params: Structure) -> None:
        function = getattr(self.library, op)
        function.argtypes, function.restype = [POINTER(type(params))], None
        function(ctypes.byref(params))


class Probes(Library):
    """The kernels of csrc/cuda/probes_sm90.cuh, on CPU tensors."""

    device = "cpu"

    def __init__(self, folder: Path):
        super().__init__("probes.cpp", folder)

    def load(self, pages: KVPages, eight_bit: bool, rows: tuple[int, int], head: int, *written: Tensor) -> None:
        self.run("probe_load", ProbeLoad(pool(pages), shape(pages), eight_bit, *rows, head, *map(address, written)))

    def multiply(self, like: KVPages, eight_bit: bool, values: bool, a: Tensor, b: Tensor, out: Tensor) -> None:
        self.run("probe_multiply", ProbeMultiply(pool(like), eight_bit, values, *map(address, (a, b, out))))


class PageOps(Library):
    """The ops of csrc/cuda/kv_pages.cuh and qkv.cuh, on CPU tensors."""

    def __init__(self, folder: Path):
        super().__init__("pages.cpp", folder)

    def kv_append(self, k: Tensor, v: Tensor, pages: KVPages, where: PageList) -> None:
        self.run("kv_append", Append(rows(k), rows(v), pool(pages), listed(where), shape(pages), len(k), dtype(k)))

    def kv_commit(self, source, source_list, target, target_list, k_mean=None) -> None:
        lists = listed(source_list), listed(target_list)
        self.run("kv_commit", Commit(pool(source), pool(target), *lists, address(k_mean), shape(source)))

    def kv_gather(self, pools, where, out) -> None:
        k, v = out
        given = Pools((Pool * 8)(*map(pool, pools)), len(pools))
        self.run("kv_gather", Gather(given, listed(where), shape(pools[0]), rows(k), rows(v), len(k), dtype(k)))

    def qkv_prologue(self, qkv, norm_q, norm_k, rope, pages, where, *, norm_q_bias=None, norm_k_bias=None, bias=None,
                     k_mean=None, eps=1e-6, interleaved=True, out) -> None:  # fmt: skip
        sizes = (0 if x is None else len(x) for x in (norm_q, norm_k))
        pairs = 0 if rope is None else rope.shape[1]
        weights = map(address, (bias, norm_q, norm_k, norm_q_bias, norm_k_bias))
        self.run(
            "qkv_prologue",
            Prologue(address(qkv), address(out), qkv.stride(0), *weights, *sizes, address(rope), address(k_mean), pairs,
                     interleaved, eps, pool(pages), listed(where), shape(pages), len(qkv), out.shape[1], dtype(qkv), 0),
        )  # fmt: skip
