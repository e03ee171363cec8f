"""Compiling ahead of time, without a GPU: what each kernel uses of one, in every format and shipped configuration.

A kernel module lists its cases: calls of real widths whose launches are compiled in place of being run. The numbers are
those of ptxas and the tensor-core instruction is read off the PTX, so they hold for the Triton that is installed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import triton

from .._dispatch import Unsupported
from .kv_pages import cases as page_cases
from .launch import compile_only
from .linear import cases as linear_cases
from .merge import cases as merge_cases
from .qkv import cases as prologue_cases

CASES = (page_cases, prologue_cases, merge_cases, linear_cases)  # each yields (op, what it is given, the call)


class Row(NamedTuple):
    """One kernel of one case on one architecture; without a kernel where the architecture can't."""

    op: str
    case: str
    architecture: int
    kernel: str = ""
    registers: int = 0
    spilled: int = 0  # bytes of a thread's stack
    shared: int = 0  # bytes of shared memory
    tensor_core: str = ""  # the instruction that most products are made by
    warning: str = ""
    unsupported: str = ""

    @property
    def sound(self) -> bool:
        return self.spilled == 0 and not self.warning


def compile_ahead(architectures: list[int], ops: list[str] | None = None) -> Iterator[Row]:
    """Every case of these ops, or of all, on each architecture in turn."""
    for op, case, call in chain.from_iterable(cases() for cases in CASES):
        if ops is None or op in ops:
            for architecture in architectures:
                yield from _compile(op, case, architecture, call)


def _compile(op: str, case: str, architecture: int, call: Callable[[], object]) -> Iterator[Row]:
    with compile_only(architecture) as kernels:
        try:
            call()
        except Unsupported as error:
            yield Row(op, case, architecture, unsupported=str(error))
            return
    for kernel in kernels:
        usage, ptx = resources(kernel.asm["cubin"]), kernel.asm["ptx"]
        instruction = tensor_core(ptx)
        yield Row(
            *(op, case, architecture, kernel.metadata.name),
            registers=usage["REG"],
            spilled=usage["STACK"] + usage["LOCAL"],
            shared=kernel.metadata.shared,
            tensor_core=instruction,
            warning=serialized(ptx) if "wgmma" in instruction else "",
        )


def resources(cubin: bytes) -> dict[str, int]:
    """{"REG": 80, "STACK": 0, ...} as cuobjdump reads them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        text = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", line)}


def tensor_core(ptx: str) -> str:
    """The commonest of "wgmma m64n256k32 s8", "mma m16n8k16 bf16", "tcgen05 f8f6f4"; "" if there is none."""
    found = re.findall(r"\b(wgmma)\.mma_async\S*\.(m\d+n\d+k\d+)\.\w+\.(\w+)", ptx)
    found += re.findall(r"\b(mma)\.sync\S*\.(m\d+n\d+k\d+)\S*?\.(s8|f16|bf16|tf32|e4m3|f64)\b", ptx)
    found += [(name, kind, "") for name, kind in re.findall(r"\b(tcgen05)\.mma\S*kind::(\w+)", ptx)]
    return " ".join(Counter(found).most_common(1)[0][0]).strip() if found else ""


def serialized(ptx: str) -> str:
    """ptxas's C7510, if it has one to say: wgmma instructions that wait for each other are a silent factor of two."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        said = _run(get_ptxas(90).path, "--gpu-name=sm_90a", str(file), "-o", str(Path(folder, "cubin")))
    return next((line.strip() for line in said.splitlines() if "C7510" in line), "")


def _run(*command: str) -> str:
    done: Any = subprocess.run(command, capture_output=True, text=True, check=True)
    return str(done.stdout + done.stderr)
